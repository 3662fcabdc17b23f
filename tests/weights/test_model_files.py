"""python -m pytest tests/weights/test_model_files.py

Model folders -> sharded parameters -> model folders. The oracle is transformers' own loader.
"""

import json
import os
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_tokenizer, records, tiny_llama
from processes import run_ranks
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from trainings import damaged_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Glm4MoeConfig,
    MixtralConfig,
)

from nanoalign.batch import collate
from nanoalign.distributed import full, setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.model import Policy, RewardModel
from nanoalign.packing.packed import PackedBatcher
from nanoalign.weights import tensor_files, write
from nanoalign.weights.folders import local_folder
from nanoalign.weights.slices import places_of, read_slices
from nanoalign.weights.tensor_files import names_in_index, stored_tensors
from nanoalign.weights.write import change_json, write_model

load = partial(Policy.load, read=read_slices)


@pytest.fixture(scope="module")
def batch(tokenizer):
    return collate(encode_all(records(4), tokenizer))


def score(folder: Path, batch) -> torch.Tensor:
    """The oracle: transformers' own loader."""
    with torch.no_grad():
        return Policy(AutoModelForCausalLM.from_pretrained(folder).eval())(batch)


SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def write_mixtral(folder: Path, **options) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_glm(folder: Path) -> Path:
    """Fused experts, and a persistent buffer that no rank shards."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        **SIZES, head_dim=16, n_group=1, topk_group=1, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            torch.nn.init.normal_(buffer)
    model.save_pretrained(folder)
    return folder


# --- reading


@pytest.mark.parametrize("model", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "trainable": False},
        {"head_seed": 3},
        {"head_seed": 3, "dtype": torch.bfloat16, "trainable": False},
    ],
)
def test_slices_are_what_the_core_loads(llama_folder, tmp_path, model, options):
    """Names, values, dtypes, requires_grad, and buffers; of policies and of reward models."""
    folder = llama_folder if model == "llama" else write_mixtral(tmp_path)
    kind = RewardModel if "head_seed" in options else Policy
    core, sliced = kind.load(folder, **options), kind.load(folder, read=read_slices, **options)
    expected, found = (dict(m.named_parameters(remove_duplicate=False)) for m in (core, sliced))
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].dtype == parameter.dtype, name
        assert found[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(found[name], parameter), name
    buffers = dict(sliced.named_buffers())
    for name, buffer in core.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def load_and_write(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """On any number of ranks: all tensors, from the slices that each rank read; a copy in `out`."""
    world = setup()
    policy = load(folder, world)
    write_model(policy, byte_tokenizer(), out, world)
    return {name: full(tensor.detach()) for name, tensor in policy.model.state_dict().items()}


@pytest.mark.parametrize("model", ["llama", "mixtral", "glm"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_read_and_write_what_transformers_loads(llama_folder, tmp_path, model, ranks):
    """259 rows of embedding do not divide by 2 or 3. Experts, which are fused in memory, are apart
    in the files of Mixtral, whose names stay.
    """
    folder = llama_folder
    if model != "llama":
        folder = (write_mixtral if model == "mixtral" else write_glm)(tmp_path / model)
    outcome = run_ranks(ranks, load_and_write, folder, tmp_path / "out")
    assert outcome.codes == [0] * ranks, outcome.stderr
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for found in (*outcome.results, written):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    before, after = (stored_tensors(f).keys() for f in (folder, tmp_path / "out"))
    assert before == after and any("experts.3" in name for name in after) == (model != "llama")


def test_untied_heads_and_bfloat16_files(batch, tmp_path):
    tiny_llama(tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path)
    policy = load(tmp_path)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(policy(batch), Policy(exact)(batch))


def test_a_stored_head_that_differs_from_the_embedding_it_is_tied_to(llama_folder, batch, tmp_path):
    """transformers unties the two; with false in config.json there is no doubt left."""
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load(folder)(batch), score(llama_folder, batch))
        head[7, 3] += 1
        tensors["lm_head.weight"] = head
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        message = "embed_tokens.weight and lm_head.weight are one tensor .* false into config.json"
        for read in (load, partial(RewardModel.load, head_seed=1, read=read_slices)):
            with pytest.raises(RunError, match=message):
                read(folder)
        change_json(folder / "config.json", {"tie_word_embeddings": False})
        assert torch.equal(load(folder)(batch), score(folder, batch))
        assert not torch.equal(load(folder)(batch), score(llama_folder, batch))


def test_a_head_that_differs_from_its_embedding_where_transformers_converts(batch, tmp_path):
    folder = write_mixtral(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = torch.zeros(259, 32)
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="embed_tokens.weight and lm_head.weight are one tensor"):
        load(folder)


def test_a_module_at_two_places_has_two_names():
    shared = torch.nn.Linear(2, 2, bias=False)
    shared.register_buffer("kept", torch.zeros(1))
    shared.register_buffer("computed", torch.zeros(1), persistent=False)
    places = places_of(torch.nn.ModuleDict({"a": shared, "b": shared}))
    expected = {f"{m}.{name}": (shared, name) for m in "ab" for name in ("weight", "kept")}
    assert places == expected


# --- writing


def test_the_generation_config_goes_through(llama_folder, tmp_path, tokenizer):
    """It may name further EOS tokens; transformers reads this one and would refuse to write it."""
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    settings = {"eos_token_id": [258, 7], "temperature": 0.6, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    write_model(load(folder), tokenizer, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [258, 7]


@pytest.mark.parametrize(("old", "new"), [(True, True), (True, False), (False, True)])
def test_a_result_that_was_moved_in_part_is_never_two_models(
    old, new, batch, tmp_path, tokenizer, monkeypatch
):
    """Killed before any of the operations that move it: the old model, the new one, or an error."""

    def written(seed: int, sharded: bool, folder: Path) -> None:
        with monkeypatch.context() as patch:
            if sharded:
                patch.setattr(tensor_files, "MAX_FILE_BYTES", 20_000)
            write_model(Policy(tiny_llama(seed=seed)), tokenizer, folder)

    class Killed(BaseException):
        pass

    scores, found = [], []
    for seed, sharded in ((1, old), (2, new)):
        written(seed, sharded, tmp_path / f"whole{seed}")
        scores.append(score(tmp_path / f"whole{seed}", batch).tolist())
    for at in range(1, 100):
        folder, left = tmp_path / f"{at}", at

        def counted(operation, *args, **more):
            nonlocal left
            left -= 1
            if not left:
                raise Killed
            return operation(*args, **more)

        written(1, old, folder)
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir")):
                own = getattr(module, name)
                patch.setattr(
                    module, name, lambda *args, own=own, **more: counted(own, *args, **more)
                )
            try:
                written(2, new, folder)
                break
            except Killed:
                pass
        try:
            found.append(scores.index(score(folder, batch).tolist()))
        except OSError:  # of transformers, which finds no weights
            found.append(None)
    assert at > 5 and set(found) == {0, 1, None} and left > 0
    assert score(folder, batch).tolist() == scores[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(os.listdir(tmp_path / "whole2"))


def test_more_layers_than_tensors_are_refused_before_they_are_built(llama_folder, tmp_path):
    """Three million layers would take hours."""
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    change_json(folder / "config.json", {"num_hidden_layers": 3_000_000})
    with pytest.raises(
        RunError,
        match="can't be built: ValueError: config.json has 3000000 layers, but the weig",
    ):
        load(folder)


def test_writes_shards_with_an_index(llama_folder, batch, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 20_000)
    write_model(load(llama_folder), tokenizer, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:  # the largest tensor has 259 * 32 * 4 bytes, and is alone in its file
        assert (tmp_path / file).stat().st_size < 259 * 32 * 4 + 2000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in tiny_llama().parameters())
    assert torch.equal(score(tmp_path, batch), score(llama_folder, batch))
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")  # a file that the index does not name
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(batch), score(llama_folder, batch))


def test_a_failure_while_writing_leaves_the_model_that_was_there(
    llama_folder, batch, tmp_path, tokenizer, monkeypatch
):
    write_model(load(llama_folder), tokenizer, tmp_path)

    def full_disk(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    with pytest.raises(RunError, match=f"written to '{tmp_path}': .*No space left"):
        write_model(Policy(tiny_llama(seed=1)), tokenizer, tmp_path)
    assert torch.equal(score(tmp_path, batch), score(llama_folder, batch))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("is_main", [True, False])
def test_other_ranks_keep_no_tensors(tmp_path, monkeypatch, is_main):
    """Where the files split tensors, rank 0 alone has all of them at a time; others have two.

    Whether they do is asked of tensors without memory.
    """
    model = AutoModelForCausalLM.from_pretrained(write_mixtral(tmp_path))
    parameters, alive, most = dict(model.state_dict()), weakref.WeakSet(), 0

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        alive.add(copy := tensor.clone())
        most = max(most, len(alive))
        return copy

    def revert(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert alive or all(tensor.is_meta for tensor in tensors.values())
        return own(model, tensors)

    own = transformers.core_model_loading.revert_weight_conversion
    monkeypatch.setattr(transformers.core_model_loading, "revert_weight_conversion", revert)
    monkeypatch.setattr(write, "gather_tensor", gather)
    tensors = {name: lambda tensor=tensor: tensor for name, tensor in parameters.items()}
    found = [name for name, _ in write.gather_for_files(model, tensors, is_main)]
    stored = stored_tensors(tmp_path)
    assert (sorted(found), most) == ((sorted(stored), len(tensors)) if is_main else ([], 2))


def test_the_attention_of_packed_rows_is_not_written(llama_folder, tmp_path, tokenizer, world):
    """Also not its name: other programs do not know it."""
    policy = load(llama_folder)
    PackedBatcher(world, 100).prepare(policy)
    write_model(policy, tokenizer, tmp_path)
    assert "nanoalign" not in (tmp_path / "config.json").read_text()


def test_other_users_and_older_programs_may_read_the_weights(llama_folder, tmp_path, tokenizer):
    """safetensors would let the owner alone read them; transformers 4 asks for their format."""
    write_model(load(llama_folder), tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


# --- errors


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("other shape", "its weights are not those of the LlamaForCausalLM .* mismatched keys"),
        ("torn file", "not a readable safetensors file"),
        ("no language model", "can't be built: ValueError: Unrecognized configuration [^\n]*$"),
        ("unknown", "config.json: "),
        ("quantized", "is quantized; give the model with its full weights"),
        ("missing shard", "names the file model-00002-of-00002.safetensors, which is missing"),
        ("torn index", "index.json: not valid JSON: [^;]*; restore the file$"),
    ],
)
def test_a_folder_that_does_not_fit_is_an_error(llama_folder, tmp_path, damage, message):
    with pytest.raises(RunError, match=message):
        load(local_folder(damaged_model(llama_folder, tmp_path / "model", damage)))


def test_an_index_is_refused_with_one_advice(tmp_path):
    for text, message in (("{", "not valid JSON"), ('{"weight_map": 3}', "not an index of files")):
        (index := tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(RunError, match=message) as caught:
            names_in_index(index)
        assert str(caught.value).count("restore the file") == 1


def test_the_folder_of_an_adapter_is_called_one(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    with pytest.raises(RunError, match="is an adapter .* of meta-llama/Llama-3.2-1B; give the mer"):
        local_folder(tmp_path)


def refuse(folder: Path) -> str:
    world = setup()
    try:
        load(folder, world)
    except RunError as error:
        return str(error)
    return "loaded"


def test_all_ranks_refuse_together(llama_folder, tmp_path):
    """Only rank 0 reads files of another architecture; the other rank stops with the same error."""
    outcome = run_ranks(
        2, refuse, damaged_model(llama_folder, tmp_path / "model", "other architecture")
    )
    assert outcome.results[0] == outcome.results[1] and "not those of" in outcome.results[0]
