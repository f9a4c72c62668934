"""Video files (mp4, webm, mov and what else FFmpeg reads) by PyAV: the frames on show at chosen times, upright, square pixels, RGB.

A first pass reads the packets' times without decoding; a second one decodes from the nearest keyframe before each chosen time, so that a
long film costs little, and keeps the chosen frames only.
"""

from __future__ import annotations

import logging
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from flamingo_export.errors import ImageError, pip_install
from flamingo_export.runtime.images import MAX_PIXELS, RESAMPLING, Pixels
from flamingo_export.runtime.videos import chosen_times, shown_at

if TYPE_CHECKING:
    from flamingo_export.runtime.videos import Video

_log = logging.getLogger(__name__)

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,ogg,asf,h264,hevc,m4v,nut,ivf,rm,swf,dv,mxf,wtv"
)
"""What is opened. Not all that FFmpeg knows: its playlists would open other files and addresses."""
MAX_PACKETS = 4_000_000
"""A day of 46 frames per second; what claims more is refused."""
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
"""Kr and Kb by AVCOL_SPC (ITU-T H.273, table 4): BT.709, FCC, SMPTE 240M, BT.2020 twice."""
_BT601 = (0.299, 0.114)
"""Of what is not marked, as FFmpeg takes it."""
_PLANAR = frozenset(f"yuv{full}{kind}p" for full in ("", "j") for kind in ("420", "422", "444"))


@dataclass(frozen=True)
class _Timing:
    """pts of every frame in the order of showing, those of keyframes, the unit of both in seconds, and when the last frame ends."""

    pts: list[int]
    keys: list[int]
    base: Fraction
    end: int


def frames_of_video(path: Path, wanted: int, video: Video) -> Iterator[Pixels]:
    """At most `wanted` frames at the times that `video` asks for, uint8 RGB [H, W, 3].

    A file that breaks off is used up to there, with a warning. Raises ImageError if PyAV is missing, or the file has no video that can be read.
    """
    timing = _timing(path)
    chosen = _chosen(timing, wanted, video)
    frames = _decoded(path, chosen, timing)[0]
    if len(frames) < len(chosen) and timing.keys:
        # Some containers jump past the keyframe that was asked for: from the beginning, then.
        timing = replace(timing, keys=[])
        frames = _decoded(path, chosen, timing)[0]
    if len(frames) < len(chosen):
        # What the packets promise does not decode: choose again among the frames that do.
        whole = _decoded(path, None, None)[1]
        if not whole:
            raise ImageError(f"{path} is damaged: none of its {len(timing.pts)} frames can be decoded")
        _log.warning("%s is damaged: %d of its %d frames can be decoded; those are used", path, len(whole), len(timing.pts))
        step = max(1, (timing.end - timing.pts[0]) // len(timing.pts))
        timing = _Timing(pts=whole, keys=[], base=timing.base, end=whole[-1] + step)
        chosen = _chosen(timing, wanted, video)
        frames = _decoded(path, chosen, timing)[0]
        if len(frames) < len(chosen):
            raise ImageError(f"{path} is damaged: its frames decode differently each time")
    yield from frames


def _chosen(timing: _Timing, wanted: int, video: Video) -> list[int]:
    """pts of the frames to show, ascending."""
    start = timing.pts[0]
    begins = [float((each - start) * timing.base) for each in timing.pts]
    times = chosen_times(0.0, begins[-1], float((timing.end - start) * timing.base), wanted, video)
    return [timing.pts[index] for index in shown_at(begins, times)]


def _timing(path: Path) -> _Timing:
    """The times that the packets tell, or the decoded frames where packets tell none."""
    import av

    with _opened(path) as (container, stream):
        pts, keys, ends, plain = [], [], [], True
        for packet in _until_error(container.demux(stream), av.error.FFmpegError):
            if packet.size == 0:
                continue
            if packet.pts is None:
                plain = False
                break
            if packet.is_keyframe:
                keys.append(packet.pts)
            if packet.is_discard:  # before or after the part that an edit list shows: decoded on the way, and not a frame
                continue
            pts.append(packet.pts)
            ends.append(packet.pts + (packet.duration or 0))
            if len(pts) > MAX_PACKETS:
                raise ImageError(f"{path} has more than {MAX_PACKETS} frames. Cut out the part you mean first.")
        base = stream.time_base or Fraction(1, 1000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    if not plain or not pts:
        shown = _decoded(path, None, None)[1]
        if not shown:
            raise ImageError(f"{path} has no frames that can be decoded")
        pts, keys, ends = shown, [], []
    pts = sorted(set(pts))
    step = max(1, round(1 / (rate * base)))
    return _Timing(
        pts=pts, keys=sorted(keys), base=base, end=max([pts[-1] + (0 if max(ends, default=0) > pts[-1] else step), *ends])
    )


def _until_error(packets: Iterator[Any], error: type[Exception]) -> Iterator[Any]:
    """The packets up to where the file breaks off."""
    with suppress(error):
        yield from packets


def _decoded(path: Path, chosen: Sequence[int] | None, timing: _Timing | None) -> tuple[list[Pixels], list[int]]:
    """The frames with these pts, and the pts of all that were decoded on the way; chosen: None decodes everything and keeps nothing."""
    import av

    frames: list[Pixels] = []
    seen: list[int] = []
    left = list(chosen or ())
    with _opened(path) as (container, stream):
        position = timing.pts[0] if timing is not None else 0
        counted = 0
        # One generator as long as nothing is jumped over: frames that a decoder still holds at the file's end come out of it only.
        coming = container.decode(stream)
        try:
            while True:
                if left and timing is not None and timing.keys:
                    at = bisect_right(timing.keys, left[0])
                    if at and timing.keys[at - 1] > position:
                        container.seek(timing.keys[at - 1], stream=stream, backward=True)
                        coming = container.decode(stream)
                passed = False
                for frame in coming:
                    # A file without times: frames are counted at the rate that it claims.
                    now = frame.pts if frame.pts is not None else counted
                    counted = now + (frame.duration or _step(stream))
                    position = max(position, now)
                    seen.append(now)
                    if left and now >= left[0]:
                        if now == left[0]:
                            frames.append(_upright(frame, stream, path))
                        left.pop(0)
                        passed = True
                        break
                if chosen is not None and not left:
                    break
                if not passed:
                    break
        except av.error.FFmpegError as error:
            _log.debug("%s: %s", path, error)
    return frames, sorted(set(seen))


def _rgb(frame: Any) -> Pixels:
    """RGB [H, W, 3] by the frame's own matrix and range, chroma repeated.

    Computed here: FFmpeg's own conversion is up to 3 levels off the matrix.
    """
    from av.video.reformatter import ColorRange, Colorspace

    if frame.format.is_rgb or frame.format.has_palette:
        whole: Pixels = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        return whole
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    kr, kb = _MATRICES.get(int(frame.colorspace), _BT601)
    if frame.format.name not in _PLANAR:  # more bits, other orders of planes, palettes
        space = Colorspace.ITU601  # the same before and after, so that no matrix is applied here
        limits = ColorRange.JPEG if full else ColorRange.MPEG
        frame = frame.reformat(
            format="yuv444p", src_colorspace=space, dst_colorspace=space, src_color_range=limits, dst_color_range=limits
        )
    luma, cb, cr = (_plane(plane, frame) for plane in frame.planes[:3])
    zero, luma_range, chroma_range = (0, 255, 255) if full else (16, 219, 224)
    y = (luma - np.float32(zero)) * np.float32(255 / luma_range)
    u, v = ((plane - np.float32(128)) * np.float32(255 / chroma_range) for plane in (cb, cr))
    rgb = np.empty((*y.shape, 3), np.float32)
    rgb[..., 0] = y + np.float32(2 * (1 - kr)) * v
    rgb[..., 2] = y + np.float32(2 * (1 - kb)) * u
    rgb[..., 1] = (y - np.float32(kr) * rgb[..., 0] - np.float32(kb) * rgb[..., 2]) / np.float32(1 - kr - kb)
    rounded: Pixels = np.rint(np.clip(rgb, 0, 255)).astype(np.uint8)
    return rounded


def _plane(plane: Any, frame: Any) -> npt.NDArray[np.float32]:
    """A plane float32 [H, W], repeated to the frame's size where it is smaller."""
    values = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(np.float32)
    for axis, size in enumerate((frame.height, frame.width)):
        if values.shape[axis] < size:
            values = np.repeat(values, 2, axis=axis)
    return values[: frame.height, : frame.width]


def _step(stream: Any) -> int:
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return max(1, round(1 / (rate * (stream.time_base or Fraction(1, 1000)))))


def _upright(frame: Any, stream: Any, path: Path) -> Pixels:
    """A decoded frame as a viewer would show it: RGB by its own matrix and range, square pixels, turned and mirrored as the file says."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ImageError(
            f"{path} has frames of {frame.width}x{frame.height} pixels, more than {MAX_PIXELS // 1_000_000} million. Scale it down."
        )
    image = Image.fromarray(_rgb(frame))
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        if not Fraction(1, 16) <= aspect <= 16:
            raise ImageError(f"{path} claims pixels {aspect} times as wide as high, which is not possible")
        wide = aspect > 1
        size = (round(image.width * aspect), image.height) if wide else (image.width, round(image.height / aspect))
        if size[0] * size[1] > MAX_PIXELS:
            raise ImageError(
                f"{path} is shown with {size[0]}x{size[1]} pixels, more than {MAX_PIXELS // 1_000_000} million. Scale it down."
            )
        image = image.resize(size, RESAMPLING)
    pixels: Pixels = np.ascontiguousarray(_displayed(np.asarray(image), *_display_matrix(frame)))
    return pixels


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """a, b, c, d: what is at x, y of the frame is shown at ax + cy, bx + dy."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # the frame has other data too, of a kind that PyAV does not know; it still knows the angle
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if data is None:
        return 1.0, 0.0, 0.0, 1.0
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    return a, b, c, d


def _displayed(pixels: Pixels, a: float, b: float, c: float, d: float) -> Pixels:
    """Pixels [H, W, 3] turned and mirrored by the quarters of a turn nearest to a display matrix."""
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. Raises ImageError."""
    try:
        import av
    except ImportError as error:
        raise ImageError(
            f"{path} is not an image that can be read, and video files need PyAV ({error}). Install it: {pip_install('video')}"
        ) from None
    # An absolute path cannot be taken for another protocol, whatever the file is called.
    absolute = "file:" + os.path.abspath(path)
    try:
        container = av.open(absolute, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise ImageError(f"{path} is neither an image nor a video that can be read ({error})") from None
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            held = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise ImageError(f"{path} holds no video ({held} only)")
        stream = streams[0]
        stream.thread_type = "AUTO"
        if stream.codec_context is None:
            raise ImageError(
                f"{path}: there is no decoder for its video. Get the whole file if it was cut off, or convert it: "
                "ffmpeg -i FILE -c:v libx264 OUT.mp4"
            )
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{path} has frames of {width}x{height} pixels, more than {MAX_PIXELS // 1_000_000} million. Scale it down."
            )
        yield container, stream


def _is_cover(stream: Any) -> bool:
    """Whether the stream is a picture attached to a piece of music."""
    disposition = getattr(stream, "disposition", None)
    return bool(disposition is not None and "attached_pic" in str(disposition).lower())
