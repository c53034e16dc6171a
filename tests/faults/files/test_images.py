"""Images that are damaged, odd, hostile or gone: each is a row that says so, and the rest is attacked."""

from __future__ import annotations

import io
import os
import socket
import stat
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orthattack.eval.data.prefetch import Decoder
from orthattack.eval.data.readers import MAX_BYTES, Files
from orthattack.eval.models.preprocessing import DecodeError, Preprocessing, decode
from orthattack.eval.storage.run_folder import RunFolder
from tests.faults.files.conftest import MODEL, process, rows
from tests.stored import assert_same, contents

COLOUR = (200, 120, 40)
GREY = 120
RGB = Image.new("RGB", (32, 32), COLOUR)
OTHER = Image.new("RGB", (32, 32), (9, 9, 9))


def written(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def palette() -> Image.Image:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, *COLOUR, 255, 255, 255])
    return image


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 20,000 x 20,000."""
    data = written(RGB, "PNG")
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


JPEG, PNG = written(RGB, "JPEG", quality=95), written(RGB, "PNG")

# What is an image, and the colour that it must come out with, to a grey level or two where the format loses some.
GOOD: dict[str, tuple[bytes, tuple[int, int, int], int]] = {
    "plain.png": (PNG, COLOUR, 0),
    "plain.jpg": (JPEG, COLOUR, 3),
    "one pixel.png": (written(Image.new("RGB", (1, 1), COLOUR), "PNG"), COLOUR, 0),
    "grey.png": (written(Image.new("L", (40, 32), GREY), "PNG"), (GREY,) * 3, 0),
    "grey with alpha.png": (written(Image.new("LA", (32, 32), (GREY, 9)), "PNG"), (GREY,) * 3, 0),
    "black and white.png": (written(Image.new("1", (32, 32), 1), "PNG"), (255,) * 3, 0),
    "sixteen bit.png": (written(Image.fromarray(np.full((32, 32), 257 * GREY, np.uint16)), "PNG"), (GREY,) * 3, 1),
    "sixteen bit.tif": (written(Image.fromarray(np.full((32, 32), 257 * GREY, np.uint16)), "TIFF"), (GREY,) * 3, 1),
    "transparent.png": (written(Image.new("RGBA", (32, 32), (*COLOUR, 7)), "PNG"), COLOUR, 0),
    "cmyk.jpg": (written(RGB.convert("CMYK"), "JPEG", quality=95), COLOUR, 4),
    "cmyk.tiff": (written(RGB.convert("CMYK"), "TIFF"), COLOUR, 0),
    "palette.png": (written(palette(), "PNG"), COLOUR, 0),
    "palette, transparent.png": (written(palette(), "PNG", transparency=b"\xff\x00\x80"), COLOUR, 0),
    "animated.webp": (written(RGB, "WEBP", save_all=True, append_images=[OTHER], lossless=True), COLOUR, 2),
    "animated.png": (written(RGB, "PNG", save_all=True, append_images=[OTHER]), COLOUR, 0),
    "animated gif.png": (written(RGB, "GIF", save_all=True, append_images=[OTHER]), COLOUR, 1),
    "a jpeg.png": (JPEG, COLOUR, 3),
    "a png.jpg": (PNG, COLOUR, 0),
}

# What is none, and what its row must say.
BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "the file is empty"),
    "text.jpg": (b"<script>alert(1)</script>", "not an image of a known format"),
    "truncated.png": (PNG[: len(PNG) // 2], "damaged ("),
    "truncated.jpg": (JPEG[:-200], "damaged ("),
    "header alone.jpg": (JPEG[:20], ""),
    "zeros.png": (PNG[:33] + bytes(400), "not an image of a known format"),
    "bomb.png": (bomb(), "too large to decode safely (Image size (400000000 pixels) exceeds limit"),
    "long.png": (written(Image.new("L", (100_000, 1)), "PNG"), "its sides differ too much"),
    "float.tif": (written(RGB.convert("F"), "TIFF"), "pixels of mode F have no known range"),
    "postscript.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n",
        "not an image of a known format",
    ),
}


@pytest.mark.slow
def test_every_kind_of_image_file_is_attacked_or_is_a_row_that_says_why(tmp_path):
    """In a process of its own: nothing hangs, and nothing but our own lines is printed."""
    data = tmp_path / "data"
    data.mkdir()
    for name, (content, *_) in (GOOD | BAD).items():
        (data / name).write_bytes(content)
    (data / "folder.jpg").mkdir()
    (data / "dangling.jpg").symlink_to(data / "nothing")
    os.mkfifo(data / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(data / "socket.jpg"))
    (data / "huge.jpg").touch()
    os.truncate(data / "huge.jpg", 2**40)  # of nothing: it takes no room
    gone = ["folder.jpg", "dangling.jpg", "pipe.jpg", "socket.jpg", "never there.jpg"]
    refused = {name: message for name, (_, message) in BAD.items()} | dict.fromkeys(gone, "no such file")
    refused |= {"huge.jpg": "a file of 1.1e+03 GB: too large to read safely"}
    listed = [*GOOD, *refused]
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f'"{name}",3\n' for name in listed))
    run = tmp_path / "run"
    done = process(
        "eval", "--model", MODEL, "--data", data, "--labels", tmp_path / "labels.csv", "--attacks", "FGSM",
        "--no-checks", "--attack-misclassified", "--save-images", "all", "--out", run,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert all("img/s" in k or k.startswith("orthattack: ") or not k.strip() for k in done.err.splitlines()), done.err
    found = rows(run)
    assert sorted(found.index) == sorted(listed)
    for name in GOOD:
        assert found.loc[name, "status"] in ("ok", "misclassified"), (name, found.loc[name, "message"])
        assert found.loc[name, "linf"] > 0
    for name in listed[len(GOOD) :]:
        assert found.loc[name, "status"] == "unreadable"
        assert refused[name] in found.loc[name, "message"], name
    for position, image in RunFolder(run).images(MODEL, "clean", None):
        _, colour, tolerance = GOOD[listed[position]]
        assert np.abs(255 * image.numpy() - np.array(colour)[:, None, None]).max() <= tolerance + 1e-3, listed[position]
    assert f"left out of {MODEL} by every attack: {len(gone)} x unreadable: no such file" in done.out


def test_a_folder_of_odd_files_is_evaluated(dataset, evaluated):
    """As above, found by folder: a folder with an image's name is not one."""
    (dataset / "4" / "bad.png").write_bytes(PNG[:50])
    (dataset / "5" / "x.jpg").mkdir()
    (dataset / "6" / "dangling.png").symlink_to("nothing")
    (dataset / "7" / "circle.png").symlink_to("circle.png")
    (dataset / "7" / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(dataset / "8" / "pipe.png")
    (dataset / "9" / ".hidden").write_bytes(b"x")
    done = evaluated("--data", dataset)
    assert done.code == 0, done.err
    found = rows(dataset.parent / "run")
    unreadable = found.index[found["status"] == "unreadable"]
    assert set(unreadable) == {"4/bad.png", "6/dangling.png", "7/circle.png", "7/endless.png", "8/pipe.png"}
    assert len(found) == 15


def test_names_that_are_no_text_are_stored_as_text(dataset, evaluated):
    name = os.fsdecode(b"caf\xe9\xff.png")
    (dataset / "3" / "a.png").rename(dataset / "3" / name)
    (dataset / "4" / "line\nbreak <b>.png").write_bytes(PNG)
    done = evaluated("--data", dataset, "--save-images", "all")
    assert done.code == 0, done.err
    run = dataset.parent / "run"
    assert "3/caf\\udce9\\udcff.png" in rows(run).index
    assert "line\nbreak <b>" not in (run / "report.html").read_text(encoding="utf-8")


def test_a_file_that_may_not_be_read_is_a_row(evaluated):
    """The kernel refuses: as another user, where the tests run as one who may read everything."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.png"
        path.write_bytes(PNG)
        Path(name).chmod(stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):
                Files([path]).content(0)
        finally:
            os.seteuid(user)


def test_the_limit_for_a_files_size_is_of_the_file_and_not_of_what_is_read(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(PNG)
    assert Files([path]).content(0) == PNG
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(DecodeError, match="too large to read safely"):
        Files([path]).content(0)


def test_a_bomb_is_refused_before_anything_is_allocated():
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(DecodeError, match="too large to decode safely"):
        decode(bomb())
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert Preprocessing(8, 8)(decode(PNG)).shape == (3, 8, 8)


CHANGES = {
    "added": lambda data: (data / "3" / "b.png").write_bytes(PNG),
    "removed": lambda data: (data / "3" / "a.png").unlink(),
    "renamed": lambda data: (data / "3" / "a.png").rename(data / "3" / "z.png"),
    "of another size": lambda data: (data / "3" / "a.png").write_bytes(PNG),
    "of the same size": lambda data: turned(data / "3" / "a.png"),
    "another label": lambda data: (data / "3" / "a.png").rename(data / "4" / "b.png"),
}


def turned(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("removed", "of the same size"))) for name in CHANGES],
)
def test_images_that_changed_since_the_start_are_noticed_and_nothing_is_lost(dataset, evaluated, change):
    run = dataset.parent / "run"
    (dataset / "3" / "0.png").write_bytes(PNG)
    assert evaluated("--data", dataset).code == 0
    before = contents(run)
    CHANGES[change](dataset)
    told = evaluated("--data", dataset)
    assert told.code == 2
    assert f"{run} holds another run; choose another folder, or make these the same" in told.err
    assert f"{MODEL}: data." in told.err
    assert_same(contents(run), before)


def test_an_image_that_goes_while_the_run_is_under_way_is_a_row(dataset, evaluated, monkeypatch):
    """Removed after the list was made, before it is decoded."""
    take = Decoder.take

    def removed(*arguments):
        (dataset / "3" / "a.png").unlink(missing_ok=True)
        return take(*arguments)

    monkeypatch.setattr(Decoder, "take", removed)
    assert evaluated("--data", dataset).code == 0
    found = rows(dataset.parent / "run")
    assert found.loc["3/a.png", "status"] == "unreadable"
    assert found.loc["3/a.png", "message"] == "no such file"
    assert (found["status"] == "unreadable").sum() == 1
