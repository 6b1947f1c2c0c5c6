"""The help of a command: drawn by tyro from the same dataclasses that hold the options, grouped by room."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from paceline.options import option_fields

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    from paceline.options import Options

# tyro joins lines that follow each other, so each of these is one line that fits on 80 columns.
_ABOUT = {
    "train": "Train a detector: paceline train data=path/to/data.yaml model=yolo11n epochs=100\n\n"
    "Most runs need no more than data, model, epochs, imgsz, batch, device and name.",
    "val": "Score trained weights: paceline val model=runs/train",
    "predict": "Find objects in images: paceline predict street.jpg photos/ model=runs/train",
    "tune": "Search hyper-parameters: paceline tune path/to/data.yaml epochs=30 trials=40\n\n"
    "Trials run side by side, one per device. `tune options` come last.",
    "bench": "Measure how fast a network trains here: paceline bench model=yolo11n batch=16",
    "data check": "Look for mistakes, file by file: paceline data check path/to/data.yaml",
    "data pack": "Put a data set into one file: paceline data pack path/to/data.yaml set.pack",
    "data convert": "Write another format: paceline data convert path/to/data.yaml out --format coco",
    "data plot": "Draw classes, box sizes, places: paceline data plot path/to/data.yaml plot.png",
}
_SPELLING = """

Write options as {option}, --{option_dashed} {value} or --{option_dashed}={value};{flags}
--config FILE reads options from YAML; those on the command line go before it.
"""


_MOST_USED = frozenset(
    {"model", "data", "source", "epochs", "imgsz", "batch", "cache", "device", "devices", "name", "resume", "time"}
    | {"split", "conf", "save", "save_txt", "trials", "space", "objective", "seconds", "compare"}
)
_BRIEFLY = "\n\nThese are the most used options; --help lists all of them."


def print_help(options: type[Options], *, brief: bool = False) -> None:
    """Print the options of a command with their meanings and defaults, all or, if `brief`, the most used."""
    import tyro

    with suppress(SystemExit):  # by which tyro ends after its help
        tyro.cli(
            _shortened(options()) if brief else options,
            prog=f"paceline {options.COMMAND}",
            description=_ABOUT[options.COMMAND] + (_BRIEFLY if brief else "") + _spelling(options),
            args=["--help"],
            registry=_values(),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )


def _shortened(options: Any) -> type[Any]:
    """Return a class like that of `options`, with its defaults, of which tyro shows the most used fields alone."""
    import tyro

    kind = type(options)
    fields: list[tuple[str, Any, Any]] = []
    for name, hint in get_type_hints(kind).items():
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            room = _shortened(value)
            fields.append((name, room, dataclasses.field(default_factory=room)))
        elif name in {entry.name for entry in dataclasses.fields(kind)}:
            shown: Any = hint if name in _MOST_USED else tyro.conf.Suppress[hint]  # type: ignore[misc, valid-type]
            fields.append((name, shown, dataclasses.field(default=value)))
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)


def _spelling(options: type[Options]) -> str:
    """Say how options are written, by those that the command has."""
    known = option_fields(options)
    name, value = ("imgsz", "640") if "imgsz" in known else ("data", "shapes")
    flag = next((key for key, entry in known.items() if entry.annotation is bool), "")
    flags = f"\n- and _ in names are the same, and --{flag.replace('_', '-')} alone means true." if flag else ""
    return _SPELLING.format(option=f"{name}={value}", option_dashed=name, value=value, flags=flags)


def _values() -> ConstructorRegistry:
    """Show values as they are written: `true` and `false`, and in place of no text and of no list a word."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def shown(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[object] | None:
        """Describe how a type is spelled; nothing is ever read by it, since `paceline.options` does that."""
        is_list = get_origin(info.type) is tuple
        if info.type not in {bool, str} and not is_list:
            return None
        kind = "{true,false}" if info.type is bool else "LIST" if is_list else "TEXT"

        def words(value: object) -> list[str]:
            if isinstance(value, bool):
                return [str(value).lower()]
            return [str(entry) for entry in value] if isinstance(value, tuple) and value else [str(value or "empty")]

        return PrimitiveConstructorSpec(
            nargs="*" if is_list else 1,
            metavar=kind,
            instance_from_str=lambda texts: texts,
            is_instance=lambda _: True,
            str_from_instance=words,
        )

    return registry
