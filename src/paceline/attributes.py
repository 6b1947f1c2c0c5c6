"""The attributes of the reference's Python objects that are not here: what to write instead. Never imports torch.

The names are those of its public documentation. An attribute that is in no table is a mistake like any other.
"""

from __future__ import annotations

from types import MappingProxyType

_TENSORS = "its xyxy, xywh, conf, cls and data are tensors: write boxes.xyxy.cpu().numpy()"
_FIGURES = "write evaluation.ap, .ap50 and .ap75, or evaluation.record for all figures, per class too"
_RECORDED = "write .evaluation for the figures of the best weights, .folder for the run's files"
_CALLBACK = "derive a class from paceline.callbacks.Callback and give train(callbacks=[...]) one"
_IN_BOXES = "the boxes are in .boxes: write results.boxes.xyxy, .xywh, .conf or .cls"
_DETECTION_ONLY = "only detection is offered: see .boxes"
_DEVICE = "name the device with each call, as in predict(source, device=0)"

INSTEAD = MappingProxyType(
    {
        "YOLO": {
            "export": "exporting is not there yet; the weights of a run are plain safetensors files",
            "track": "tracking is not offered; predict finds the objects of single images",
            "add_callback": _CALLBACK,
            "clear_callback": _CALLBACK,
            "reset_callbacks": _CALLBACK,
            "load": "name the weights when the object is made, as in YOLO('runs/train')",
            "save": "a run saves its weights by itself; train(...) gives back their file as best_weights",
            "to": _DEVICE,
            "cpu": _DEVICE,
            "cuda": _DEVICE,
            "device": _DEVICE,
            "fuse": "norms are folded into the convolutions by themselves where the network only predicts",
            "embed": "feature vectors are not given out",
            "callbacks": _CALLBACK,
            "predictor": "predict(...) gives the results back",
            "task": "it is always detection",
            "metrics": "train(...) and val() give the figures back",
            "trainer": "train(...) gives back the run's folder and figures",
            "ckpt_path": "write .model",
            "overrides": "options are given with each call",
        },
        "Results": {
            "show": "no windows are opened; write save('found.jpg'), or draw the array of plot()",
            "verbose": "write str(results)",
            "summary": "write to_dicts()",
            "tojson": "write to_json()",
            "to_df": "write pandas.json_normalize(results.to_dicts())",
            "to_csv": "write pandas.json_normalize(results.to_dicts()).to_csv()",
            "save_crop": "cut the boxes out of orig_img by boxes.xyxy",
            "pandas": "write pandas.json_normalize(results.to_dicts())",
            "xyxy": _IN_BOXES,
            "xywh": _IN_BOXES,
            "conf": _IN_BOXES,
            "cls": _IN_BOXES,
            "save_dir": "with save=True the log says where pictures are; save(...) takes the file to write",
            "masks": _DETECTION_ONLY,
            "keypoints": _DETECTION_ONLY,
            "probs": _DETECTION_ONLY,
            "obb": _DETECTION_ONLY,
            "cpu": "the tensors are those of .boxes: write results.boxes.xyxy.cpu()",
            "cuda": "the tensors are those of .boxes: write results.boxes.xyxy.cuda()",
            "numpy": "the tensors are those of .boxes: write results.boxes.xyxy.cpu().numpy()",
            "to": "the tensors are those of .boxes: write results.boxes.xyxy.to(device)",
        },
        "Boxes": {
            "cpu": _TENSORS,
            "cuda": _TENSORS,
            "numpy": _TENSORS,
            "to": _TENSORS,
            "shape": "write boxes.data.shape or len(boxes)",
            "id": "tracking is not offered, so boxes have no numbers of their own",
            "is_track": "tracking is not offered, so boxes have no numbers of their own",
        },
        "Evaluation": {
            "box": _FIGURES,
            "results_dict": "write dataclasses.asdict(evaluation.record)",
            "fitness": "write evaluation.ap",
            "map": _FIGURES,
            "map50": _FIGURES,
            "map75": _FIGURES,
            "maps": "write [entry.ap for entry in evaluation.record.per_class]",
            "class_result": "write evaluation.record.per_class",
            "mean_results": _FIGURES,
            "confusion_matrix": "write evaluation.confusion",
            "speed": "`paceline bench` says how fast a network is",
            "names": "write [entry.name for entry in evaluation.record.per_class]",
        },
        "TrainResult": {
            "box": _RECORDED,
            "results_dict": _RECORDED,
            "fitness": _RECORDED,
            "maps": _RECORDED,
            "save_dir": "write .folder.path",
        },
    }
)


def missing(holder: object, name: str) -> AttributeError:
    """Make the error for an attribute that an object does not have, with what to write instead where that is known."""
    kind = type(holder).__name__
    sentence = INSTEAD.get(kind, {}).get(name, "")
    return AttributeError(
        f"{kind!r} object has no attribute {name!r}" + (f": {sentence}." if sentence else ""), name=name, obj=holder
    )
