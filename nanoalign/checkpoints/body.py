"""The body of a model for which transformers names none."""

from pathlib import Path

from transformers import PreTrainedModel

from nanoalign.errors import RunError


def name_body(model: PreTrainedModel, path: Path) -> None:
    """Names the one part that is a model as the body: Llama 4 gives it another name.

    path: names the model in errors. Raises RunError if there is no such part.
    """
    parts = dict(model.named_children())
    bodies = [name for name, part in parts.items() if isinstance(part, PreTrainedModel)]
    if len(bodies) != 1:
        raise RunError(f"model '{path}': {type(model).__name__} has no body apart from its head")
    model.base_model_prefix = bodies[0]
