"""The model card of an export: README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from megacid.checkpoint.store import step_name
from megacid.evaluate.tasks import is_of_average
from megacid.models.student import Student
from megacid.storage.atomic import read_json

# Of the test split: not the settings that stand among the metrics, nor a probe's accuracy on held-out training data.
_SCORE = re.compile("^(?!held_out).*(acc|recall)")
_OBJECTIVES = ("contrastive", "instance", "cluster", "mse", "affinity")


def model_card(student: Student, name: str, run: Path, step: int, block: dict[str, Any], *, ema: bool) -> str:
    """Text of the model card.

    Args:
        run: run directory; the results of evaluations at `step` that stand there are listed.
        block: the "megacid" block of the run's resolved configuration.
        ema: whether the weights are the moving average.
    """
    results = evaluations(run, step, ema=ema)
    weights = " These weights are the moving average of the trained ones." if ema else ""
    data = ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "transformers", "megacid"],
        model_name=name,
        eval_results=[
            EvalResult("zero-shot-image-classification", dataset, dataset, metric, value)
            for dataset, metric, value in results
        ]
        or None,
    )
    terms = ", ".join(f"{term} {block['loss'][term]:g}" for term in _OBJECTIVES if block["loss"].get(term))
    size = " x ".join(map(str, student.image_shape[1:]))
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"A CLIP model of the architecture {student.model}: embeddings of width {student.embed_dim}, images of {size} "
        f"pixels, texts of {student.text_length} tokens. It was trained with megacid for {step} of "
        f"{block['run']['total_steps']} steps. The weights of its loss terms: {terms}.{weights}\n",
        _LOADING.replace("NAME", name),
    ]
    if results:
        rows = [f"| {dataset} | {metric} | {value:.4f} |" for dataset, metric, value in results]
        parts.append("\n".join(["## Evaluation\n", "| dataset | metric | value |", "|---|---|---:|", *rows]) + "\n")
    return "\n".join(parts)


def evaluations(run: Path, step: int, *, ema: bool) -> list[tuple[str, str, float]]:
    """(dataset, metric, value) of every accuracy and recall in CLIP_benchmark's schema below `run`/eval."""
    found = []
    for file in sorted(run.glob(f"eval/{step_name(step)}/*.json")):
        result = read_json(file)
        valid = isinstance(result, dict) and isinstance(result.get("metrics"), dict) and "dataset" in result
        if valid and is_of_average(result) == ema:
            found += [
                (str(result["dataset"]), metric, float(value))
                for metric, value in result["metrics"].items()
                if _SCORE.search(metric) and isinstance(value, (int, float))
            ]
    return found


_LOADING = """## Load

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:NAME")  # or hf-hub:ORG/NAME
tokenizer = open_clip.get_tokenizer("local-dir:NAME")
```

```python
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("NAME"), CLIPProcessor.from_pretrained("NAME")
```

The logits of both are equal within rounding for the same images and tokens. The processor of transformers does not
repair text encodings or HTML entities as the tokenizer of open_clip does, so such captions get other tokens.
"""
