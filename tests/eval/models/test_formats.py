"""Weights files that are something else: what each is said to be, and what to do."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.load import load_classifier
from orthattack.eval.models.weights import read_checkpoint


def torch_saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("weights.pt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def arrays() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, weight=np.ones(3))
    return stream.getvalue()


class Holder:
    """Something else beside the weights, such as a configuration."""


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 46830571\n"
FOREIGN = {
    "page": (
        b"<!DOCTYPE html><html><head><title>Sign in to\n GitHub</title></head>",
        "is an HTML page ('Sign in to GitHub'), probably a login or an error page that was saved in place",
    ),
    "page without a doctype": (b"\n\n  <HTML lang=en><body>403", "is an HTML page, probably a login"),
    "page with a BOM": ("\ufeff<!-- saved -->\n<html>\xe4".encode(), "is an HTML page"),
    "long page": (b"<!doctype html>" + "\u00e9".encode() * 5000, "is an HTML page"),
    "pointer": (POINTER, "is a Git LFS pointer, not the file of 46.8 MB itself: run git lfs pull"),
    "empty": (b"", "is empty: fetch it again"),
    "zeros": (bytes(9000), "is all zeros where a header should be, as a download that was never filled"),
    "xml": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "is XML ('AccessDenied'), probably a server's error message",
    ),
    "json": (b'{"error": "Invalid username or password."}', "is JSON ('{\"error\": \"Invalid username"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "is the index of weights that lie in several files"),
    "text": (b"404: Not Found\n", "is text ('404: Not Found'), not weights: a server's error message"),
    "gzip": (gzip.compress(torch_saved({"a": torch.ones(1)})), "is compressed with gzip: unpack it"),
    "tar": (tarred(torch_saved({})), "is a tar archive: unpack it"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file, as Keras and TensorFlow write them: weights must be"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(50), "is a NumPy array (.npy): weights must be tensors under the names"),
    "npz": (arrays(), "is an archive of NumPy arrays (.npz): weights must be tensors"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(50), "is a GGUF file"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0:onnx" + bytes(50), "is an ONNX model: weights must be"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(50), "is a PNG image"),
    "zip": (zipped({"readme.md": b"a", "weights.pt": b"b"}), "is a ZIP archive, but not as torch.save writes"),
    "new keras": (zipped({"config.json": b"{}", "model.weights.h5": b"b"}), "is a Keras model"),
    "script": (
        zipped({"net/data.pkl": b"", "net/code/__torch__/net.py": b"", "net/constants.pkl": b""}),
        "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')",
    ),
    "cut off": (torch_saved({"a": torch.ones(1000)})[:-100], "is cut off, or damaged"),
    "module": (torch_saved(torch.nn.Linear(2, 2)), "it holds a whole module (torch.nn.modules.linear.Linear)"),
    "holder": (torch_saved({"state_dict": {"a": torch.ones(1)}, "args": Holder()}), "it holds more than tensors"),
    "arrays": (torch_saved({"a": np.ones(3)}), "it holds more than tensors, and loading it could run code (numpy"),
    "pickle": (pickle.dumps({"a": 1}), "is a pickle, but not of weights as torch.save writes them"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=2), "is a pickle, but not of weights as torch.save writes them"),
    "noise": (b"\xfe\x8b\x01" * 100, "is neither a safetensors nor a PyTorch file"),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_weights_is_said_to_be_what_it_is(kind, ending, tmp_path):
    """Whatever the file is called."""
    content, message = FOREIGN[kind]
    path = tmp_path / f"w{ending}"
    path.write_bytes(content)
    with pytest.raises(EvaluationError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} is ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_are_read_whatever_the_file_is_called(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "model_best.pth.tar", _use_new_zipfile_serialization=False)
    for name in ("w.pth", "w.safetensors", "model_best.pth.tar"):
        assert torch.equal(read_checkpoint(tmp_path / name).tensors["a"], state["a"])


def test_a_path_without_a_file_is_explained(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    for path, message in (
        (tmp_path / "weight.safetensors", f"does not exist; did you mean {tmp_path / 'weights.safetensors'}?"),
        (tmp_path, f"is a folder: pass a file in it, such as {tmp_path / 'weights.safetensors'}"),
        ("https://example.org/w.pt", "is a URL: download it, and pass the file"),
    ):
        with pytest.raises(EvaluationError) as caught:
            load_classifier("resnet18", path)
        assert message in str(caught.value)
