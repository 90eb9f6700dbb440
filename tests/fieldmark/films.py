"""Small films for tests, encoded when they are asked for: blocks of colour that change with every frame."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (64, 48)


def film(path: Path, seconds: float = 3.0, seed: int = 0, fps: int = 10, codec: str = "libx264") -> Path:
    """A film whose frame n is a picture of its own; the suffix of its path says the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for _ in range(round(seconds * fps)):
            blocks = chance.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(np.kron(blocks, np.ones((16, 16, 1), dtype=np.uint8)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def film_at(path: Path, times: Sequence[float], size: tuple[int, int] = SIZE, codec: str = "mpeg4") -> Path:
    """A film whose frames, each of one grey, are shown at such seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            grey = np.full((size[1], size[0], 3), number * 40, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = int(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def all_frames(path: Path) -> list[np.ndarray]:
    """Every frame of a film, (H, W, 3), decoded at once."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
