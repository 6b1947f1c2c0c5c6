"""Codec: JPEG files to pixels on a CUDA device, by nvImageCodec, which the extra `gpu-decode` brings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Codec(Protocol):
    """Decodes batches of JPEG files on a device."""

    def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
        """Return pixels of each file, in order: uint8 HW3, or with one plane HW, unreduced and as they lie in the file.

        None where this codec refuses a file. The pixels are ready in the device's current stream, in which all work
        with them is started before the next call of as many planes; then the caller may let go of them.
        """


class NvImageCodec:
    """Decodes on a CUDA device in the current stream, with `num_threads` threads of its own for the entropy code.

    Only decoders that use the GPU are let in: what they refuse is better decoded by the loader's threads. Raises
    UserError where the package is missing or does not work here.

    nvJPEG's hardware decoder writes when it is called, not when the stream comes to it (seen on H100 by others, in
    torchcodec's pull request 1634). Memory that was given back in the order of the stream may still be read then. So
    the images of a call are kept until the work that was started before the next call has passed; the host waits for
    it in the call after that, when it has nearly always passed, and never has more than two calls' images out.
    """

    def __init__(self, device: torch.device, num_threads: int) -> None:
        try:
            from nvidia import nvimgcodec
        except ImportError as error:
            raise UserError(
                f"decode=device needs nvImageCodec, which cannot be imported ({error}); install it with "
                "`pip install 'paceline[gpu-decode]'`, or choose decode=host."
            ) from error
        kinds = nvimgcodec.BackendKind
        number = torch.cuda.current_device() if device.index is None else device.index
        try:
            self._decoder = nvimgcodec.Decoder(
                device_id=number,
                max_num_cpu_threads=max(min(num_threads, (os.cpu_count() or 2) - 1), 1),  # more, and it warns
                backends=[
                    nvimgcodec.Backend(kind) for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)
                ],
                options=":fancy_upsampling=1",  # colours between samples as the host's decoder makes them
            )
        except RuntimeError as error:
            raise UserError(
                f"decode=device is not possible, for nvImageCodec does not work with {device} ({error}); update the "
                "driver, or choose decode=host."
            ) from error
        self._device = torch.device(device.type, number)
        self._last: dict[int, list[Tensor | None]] = {}
        """Images of the last call, by planes."""
        self._worked_on: dict[int, tuple[torch.cuda.Event, list[Tensor | None]]] = {}
        """Images of the call before it, and the event behind all work with them."""
        self._params = {
            planes: nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=colours)
            for planes, colours in ((3, nvimgcodec.ColorSpec.SRGB), (1, nvimgcodec.ColorSpec.GRAY))
        }

    def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
        """Decode files; raises RuntimeError where none of them can be."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            self._let_go(stream, planes)
            images = self._decoder.decode(list(encoded), params=self._params[planes], cuda_stream=stream.cuda_stream)
            out: list[Tensor | None] = []
            for image in images:
                pixels = None if image is None else from_dlpack(image)
                out.append(pixels[..., 0] if pixels is not None and planes == 1 else pixels)
            self._last[planes] = list(out)
        return out

    def _let_go(self, stream: torch.cuda.Stream, planes: int) -> None:
        """Give back the images of the call before the last one, once no work with them is left."""
        if planes in self._worked_on:
            self._worked_on[planes][0].synchronize()
            del self._worked_on[planes]  # not before: while it waits, CUDA's pool gives the system what nobody has
        last = self._last.pop(planes, None)
        if last is not None:
            self._worked_on[planes] = (stream.record_event(), last)
