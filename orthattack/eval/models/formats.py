"""What a file is that should be weights and is not, told by its content: nothing of it is unpacked or executed."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

AGAIN = "fetch it again, and compare its size with the original's"

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", "is compressed with gzip: unpack it (gunzip or tar -xzf), and pass what is inside"),
    (0, b"BZh", "is compressed with bzip2: unpack it, and pass what is inside"),
    (0, b"\xfd7zXZ\x00", "is compressed with xz: unpack it, and pass what is inside"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it, and pass what is inside"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it, and pass what is inside"),
    (0, b"Rar!", "is a RAR archive: unpack it, and pass what is inside"),
    (257, b"ustar", "is a tar archive: unpack it (tar -xf), and pass what is inside"),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras and TensorFlow write them: {convert}"),
    (0, b"\x93NUMPY", "is a NumPy array (.npy): {convert}"),
    (0, b"GGUF", "is a GGUF file, of llama.cpp: {convert}"),
    (4, b"TFL3", "is a TensorFlow Lite model: {convert}"),
    (0, b"\x89PNG", "is a PNG image"),
    (0, b"\xff\xd8\xff", "is a JPEG image"),
    (0, b"GIF8", "is a GIF image"),
    (0, b"%PDF", "is a PDF document"),
    (0, b"PAR1", "is a Parquet file: does it belong to --data?"),
    (0, b"\x7fELF", "is a program"),
    (0, b"MZ", "is a program"),
)  # fmt: skip

_CONVERT = (
    "weights must be tensors under the names of the PyTorch architecture, so convert it there, and save them with "
    "safetensors.torch.save_file(model.state_dict(), FILE)"
)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and a brace."""
    with path.open("rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and not head.strip().startswith(b"{")


def foreign(path: Path) -> str | None:
    """What a file that is no safetensors file is, and what to do: None if it may be PyTorch's."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(4096)
    if size == 0:
        return f"is empty: {AGAIN}"
    if not head.strip(b"\0"):
        return f"is all zeros where a header should be, as a download that was never filled: {AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"^size (\d+)", head, re.MULTILINE)
        real = f" of {int(found[1]) / 1e6:.3g} MB" if found and len(found[1]) < 16 else ""
        return f"is a Git LFS pointer, not the file{real} itself: run git lfs pull in its repository"
    if head.startswith(b"PK"):
        return _archive(path)
    for offset, magic, what in _MAGIC:
        if head[offset:].startswith(magic):
            return what.format(convert=_CONVERT)
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12" and b"onnx" in head[:64].lower()):
        return f"is an ONNX model: {_CONVERT}"
    if path.suffix == ".pb" or path.name.endswith((".ckpt.index", ".ckpt.meta")):
        return f"is TensorFlow's: {_CONVERT}"
    return _text(head, whole=size <= len(head))


def _text(head: bytes, whole: bool) -> str | None:
    """What a text is; None if it is none, or may be a pickle, which can be text too."""
    try:
        text = head.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        if whole or error.start < len(head) - 4:  # which may be the cut end of a character
            return None
        text = head[: error.start].decode("utf-8-sig", "replace").strip()
    if "\0" in text:
        return None
    lower = text.lower()
    if lower.startswith("<!doctype html") or re.search(r"<(html|head|body)\b", lower):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        named = f" ({_quoted(title[1])})" if title and title[1].strip() else ""
        return (
            f"is an HTML page{named}, probably a login or an error page that was saved in place of the weights: "
            "fetch the file itself, signed in if need be"
        )
    if lower.startswith("<"):
        return (
            f"is XML{_error(re.sub('<[^>]*>', ' ', text))}, probably a server's error message that was saved in "
            "place of the weights: fetch the file itself"
        )
    if '"weight_map"' in text:
        return (
            "is the index of weights that lie in several files beside it: read them all into one dictionary, and save "
            "it with safetensors.torch.save_file"
        )
    if lower.startswith(("{", "[")):
        return (
            f"is JSON{_error(text)}, not weights: a configuration, or a server's error message that was saved in "
            "place of them"
        )
    if re.match(r"c\w+\n\w+\n|\(dp?\d|\(lp?\d|\(i\w", text):  # a pickle of protocol 0, which torch.load refuses
        return None
    if all(c.isprintable() or c.isspace() for c in text):
        return (
            f"is text{_error(text)}, not weights: a server's error message that was saved in place of them, or "
            "another file than was meant"
        )
    return None


def _error(text: str) -> str:
    """A server's error message, quoted; nothing of other files, which may be private."""
    known = r"[45]\d\d\b|not found|no ?such|denied|forbidden|unauthori[sz]ed|invalid username|rate limit|expired"
    words = " ".join(text.split())
    return f" ({words!r})" if len(words) <= 200 and re.search(known, words, re.IGNORECASE) else ""


def _quoted(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 80 else words[:77] + "...")


def _archive(path: Path) -> str | None:
    """What a ZIP archive is; None if it is as torch.save writes them."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except Exception:  # a damaged archive may raise anything
        return f"is cut off, or damaged: a PyTorch file begins so, but its end is not there: {AGAIN}"
    names = [entry.filename for entry in entries]
    inside = {re.sub(r"^[^/]*/", "", name) for name in names}
    if any(name.startswith("code/") for name in inside) and "data.pkl" in inside:
        return (
            "is a TorchScript program, which is code: save its weights alone, with "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if "data.pkl" in inside:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return (
                "is refused: it is compressed, which PyTorch's files are not, and may fill the memory: save it anew, "
                "with torch.save"
            )
        return None
    if any("exported_program" in name or "archive_format" in name for name in names):
        return (
            "is a program of torch.export: save its weights alone, with "
            "torch.save(torch.export.load(FILE).state_dict, 'weights.pt')"
        )
    if names and all(name.endswith(".npy") for name in names):
        return f"is an archive of NumPy arrays (.npz): {_CONVERT}"
    if any(name.endswith((".weights.h5", ".h5")) for name in names):
        return f"is a Keras model: {_CONVERT}"
    shown = ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
    return (
        f"is a ZIP archive, but not as torch.save writes them ({shown or 'it is empty'}): unpack it, and pass what is "
        "inside"
    )


_SEARCHED = 2**24  # bytes of a pickle

_HINT = "where it was saved, save the weights alone, with safetensors.torch.save_file(model.state_dict(), FILE)"


def refused_pickle(path: Path, error: BaseException) -> str:
    """Why ``torch.load(weights_only=True)`` refused a file, and what to do."""
    name = next(iter(re.findall(r"GLOBAL ([A-Za-z_][\w.]*)", str(error))), None)
    if name is not None and _holds_module(path):
        return f"is refused: it holds a whole module ({name}), not weights, and loading it could run code: {_HINT}"
    with path.open("rb") as stream:
        head = stream.read(_SEARCHED)
    if name is None and head[:1] == b"\x80" and not _calls(head):
        return (
            "is a pickle, but not of weights as torch.save writes them, or it is cut off: save the state dict with "
            "torch.save(model.state_dict(), FILE)"
        )
    if name is not None or head[:1] in (b"\x80", b"c", b"P"):
        holds = "" if name is None else f" ({name})"
        return f"is refused: it holds more than tensors, and loading it could run code{holds}; {_HINT}"
    return "is neither a safetensors nor a PyTorch file, nor any other kind that is known here"


def _calls(content: bytes) -> bool:
    """Whether a pickle, which is not executed, names anything to be called."""
    try:
        return any(code.name in ("GLOBAL", "STACK_GLOBAL", "INST") for code, _, _ in pickletools.genops(content))
    except Exception:  # of whatever follows it, or of what is missing
        return False


def _holds_module(path: Path) -> bool:
    """Whether a module's own attributes are named in a pickle, which is only searched."""
    try:
        with zipfile.ZipFile(path) as file:
            name = next(name for name in file.namelist() if name.endswith("data.pkl"))
            with file.open(name) as stream:
                content = stream.read(_SEARCHED)
    except (zipfile.BadZipFile, StopIteration, OSError, NotImplementedError):
        with path.open("rb") as stream:
            content = stream.read(_SEARCHED)
    return b"_parameters" in content and b"_modules" in content
