"""Section "How to use" of a model card: the folder in timm, in galaxydist and in onnxruntime, as code that runs as it is."""

from collections.abc import Mapping
from string import Template
from typing import Any

from galaxydist.evaluation.text_table import escape_markdown, fenced
from galaxydist.recipe.model_names import parse_model_name
from galaxydist.serving.app.published_model import ONNX, PROGRAM, PictureForm
from galaxydist.serving.timm_config import describe_agreement, prepares_alike

_TIMM = Template("""import timm
import torch
from PIL import Image

model = timm.create_model("$name", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("galaxy.jpg").convert("RGB")
with torch.inference_mode():
    probabilities = (model(transform(image)[None])[0]$temperature).softmax(0)
print(model.pretrained_cfg["label_names"][probabilities.argmax()], probabilities.max())""")

_GALAXYDIST = Template("""import galaxydist

predictions = galaxydist.load_predictor("$folder"$options)(["galaxy.jpg"])
print(predictions.predicted, predictions.confidence)""")

_ONNX = Template("""import json

import numpy as np
import onnxruntime
from PIL import Image

app = json.load(open("config.json"))["app"]
image = Image.open("galaxy.jpg")
$prepare
pixels = np.asarray(image, np.float32) / 255
pixels = (pixels - np.float32(app["form"]["mean"])) / np.float32(app["form"]["std"])
images = pixels.transpose(2, 0, 1)[None]$views
session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {"images": images.astype(np.float32)})[0].astype(np.float64)
probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
probabilities = (probabilities / probabilities.sum(axis=1, keepdims=True)).mean(axis=0)$temperature
print(app["classes"][probabilities.argmax()], probabilities.max())""")

_VIEWS = """
# The eight flips and quarter turns, over which the probabilities are averaged.
images = np.concatenate([np.rot90(one, turns, (2, 3)) for one in (images, images[..., ::-1]) for turns in range(4)])"""
_TEMPERATURE = """
probabilities = probabilities ** (1 / app["temperature"])
probabilities /= probabilities.sum()"""


def describe_usage(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the section's Markdown: a block of code for each way in which the folder can be used.

    Args:
        config: content of ``config.json``.
        results: content of ``results.json``.
    """
    ours, app = config["galaxydist"], config["app"]
    repo, files = ours.get("repo"), ours.get("files") or {}
    parts = []
    if repo:
        parts.append(f"Download the folder with `hf download {repo} --local-dir DIR` and run this inside it.")
    else:
        parts.append("Run this inside the folder, or give its path instead of `.`.")
    if config.get("architecture"):
        name = "hf-hub:" + repo if repo else "local-dir:."
        temperature = f" / {app['temperature']:.6g}" if app.get("temperature") else ""
        views = " of one view, without the mean over the eight views" if app.get("tta") == "d4" else ""
        parts.append(f"With timm (probabilities{views}):")
        if not prepares_alike(PictureForm(**app["form"])):
            parts.append(describe_agreement(results.get("timm")))
        parts.append(fenced(_TIMM.substitute(name=name, temperature=temperature), "python"))
    parts.append("With galaxydist, which gives the numbers of the evaluation:")
    is_own = parse_model_name(str(ours["recipe"]["model"]["name"])).kind == "function"
    parts.append(fenced(_GALAXYDIST.substitute(folder=".", options=", trust_code=True" if is_own else ""), "python"))
    if is_own:
        name = escape_markdown(str(ours["recipe"]["model"]["name"]))
        parts.append(f"The network is a function of its author, {name}: its module has to be importable here.")
    if ONNX in files:
        parts.append("With onnxruntime, numpy and Pillow alone (`model.onnx`, without torch):")
        parts.append(fenced(onnx_code(app), "python"))
    if PROGRAM in files:
        torch_version = (ours.get("libraries") or {}).get("torch")
        parts.append(
            '`model.pt2` is an archive of `torch.export`: `torch.export.load("model.pt2").module()(images)` gives logits'
            + (f". It is bound to torch {torch_version}, with which it was written." if torch_version else ".")
        )
    return "\n\n".join(parts)


def onnx_code(app: Mapping[str, Any]) -> str:
    """Return a program that labels a picture with ``model.onnx``, with those steps of the preparation that the model has.

    Args:
        app: part ``app`` of ``config.json``.
    """
    views = _VIEWS if app.get("tta") == "d4" else ""
    temperature = _TEMPERATURE if app.get("temperature") else ""
    return _ONNX.substitute(prepare="\n".join(_prepare(app["form"])), views=views, temperature=temperature)


def _prepare(form: Mapping[str, Any]) -> list[str]:
    stored, factor, size = form["stored_size"], form["factor"], form["image_size"]
    width = stored // factor
    lines = []
    if factor > 1:
        lines += [
            f"if image.size == ({stored}, {stored}):",
            f'    image.draft("RGB", ({width}, {width}))  # a JPEG is decoded smaller',
        ]
    lines += [
        'image = image.convert("RGB")',
        f"if image.size != ({width}, {width}):  # the central square",
        "    side = min(image.size)",
        "    left, top = (image.width - side) // 2, (image.height - side) // 2",
        "    image = image.crop((left, top, left + side, top + side))",
        f"    image = image.resize(({stored}, {stored}), Image.Resampling.LANCZOS){f'.reduce({factor})' if factor > 1 else ''}",
    ]
    kept = max(1, round(form["crop"] * width))
    kept += (width - kept) % 2
    margin = (width - kept) // 2
    cut = f".crop(({margin}, {margin}, {width - margin}, {width - margin}))" if margin else ""
    resize = f".resize(({size}, {size}), Image.Resampling.BILINEAR)" if kept != size else ""
    return [*lines, *([f"image = image{cut}{resize}"] if cut or resize else [])]
