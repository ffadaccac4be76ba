"""Folders that are no model's own: cache entries are followed, the others refused by name with what to do."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_folder
from safetensors.torch import save_file

from bisparse.checkpoint import CheckpointError, prune_checkpoint, verify_checkpoint
from bisparse.checkpoint.reader import open_source

STATE = {"a.weight": torch.ones(8, 8)}


def cache(folder: Path, commits: list[str], main: str | None) -> Path:
    """An entry of the hub's cache, as huggingface_hub lays it out: snapshots of links into blobs."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    for number, commit in enumerate(commits):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir()
        save_file({"a.weight": torch.full((8, 8), float(number))}, folder / "blobs" / f"w{number}")
        (folder / "blobs" / f"c{number}").write_text('{"model_type": "llama"}')
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/w{number}")
        (snapshot / "config.json").symlink_to(f"../../blobs/c{number}")
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.parametrize(("main", "expected"), [("bbb", 1.0), ("aaa", 0.0)])
def test_the_main_snapshot_of_a_cache_entry_is_taken(tmp_path: Path, main: str, expected: float) -> None:
    source = open_source(cache(tmp_path / "models--x--y", ["aaa", "bbb"], main))
    assert float(source.tensors["a.weight"].read()[0]) == expected and source.config == {"model_type": "llama"}
    prune_checkpoint(tmp_path / "models--x--y", tmp_path / "out", "2:4")
    assert verify_checkpoint(tmp_path / "out") and not (tmp_path / "out" / "config.json").is_symlink()


def test_a_single_snapshot_is_taken_and_of_several_one_must_be_named(tmp_path: Path) -> None:
    assert open_source(cache(tmp_path / "one", ["aaa"], None)).tensors.keys() == STATE.keys()
    assert open_source(cache(tmp_path / "gone", ["aaa"], "ccc")).tensors.keys() == STATE.keys()
    for name, main in (("two", None), ("evil", "../../one/snapshots/aaa")):
        with pytest.raises(CheckpointError, match=r"cache entry with 2 snapshots, none of them main; name one of them: .*aaa"):
            open_source(cache(tmp_path / name, ["aaa", "bbb"], main))
    with pytest.raises(CheckpointError, match="its download did not finish"):
        open_source(cache(tmp_path / "none", [], "aaa"))
    cache(tmp_path / "hub" / "models--x--y", ["aaa"], "aaa")
    with pytest.raises(CheckpointError, match=r"is a Hugging Face cache of 1 models; name one of them, such as .*models--x--y"):
        open_source(tmp_path / "hub")


def test_a_diffusers_pipeline_names_its_parts(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet"],
        "vae": ["diffusers", "VAE"],
        "../x": [],
        "tok": [],
    }
    for part in ("unet", "vae", "tok"):
        (tmp_path / "pipe" / part).mkdir(parents=True)
    save_file(STATE, tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save(STATE, tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.bin")
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"diffusers pipeline of several models \(unet, vae\); name its parts.*pipe/unet"):
        verify_checkpoint(tmp_path / "pipe", "2:4")
    prune_checkpoint(tmp_path / "pipe" / "vae", tmp_path / "out", "2:4")
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("inner", ["", "global_step10"])
def test_a_deepspeed_checkpoint_is_refused_by_name_and_its_model_states_are_read(tmp_path: Path, inner: str) -> None:
    place = tmp_path / "run" / inner
    place.mkdir(parents=True)
    states = place / "mp_rank_00_model_states.pt"
    torch.save(
        {"module": STATE, "optimizer": None, "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": "0.14"}, states
    )
    torch.save({"optimizer_state_dict": {"x": torch.ones(4)}}, place / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "run" / "latest").write_text("global_step10")
    with pytest.raises(CheckpointError, match=r"is a DeepSpeed checkpoint.*zero_to_fp32\.py"):
        verify_checkpoint(tmp_path / "run", "2:4")
    assert open_source(states).tensors.keys() == STATE.keys()


def test_a_folder_whose_folders_hold_weights_names_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "run" / "checkpoint-500", STATE)
    with pytest.raises(CheckpointError, match=r"holds no weights itself, but its folders do \(checkpoint-500\); name one"):
        verify_checkpoint(tmp_path / "run", "2:4")


def test_an_index_that_omits_a_buffer_says_what_to_add(tmp_path: Path) -> None:
    save_file({**STATE, "rotary.inv_freq": torch.ones(4)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    content = {"weight_map": {"a.weight": "model-1.safetensors"}}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not place there") as caught:
        verify_checkpoint(tmp_path, "2:4")
    entry = '"rotary.inv_freq": "model-1.safetensors"'
    assert f"add {entry} to the weight_map" in str(caught.value)
    index.write_text(json.dumps(content).replace('{"a.w', f'{{{entry}, "a.w'))
    assert open_source(tmp_path).tensors.keys() == {"a.weight", "rotary.inv_freq"}


@pytest.mark.parametrize(
    "config", ['{"architectures": 5}', '{"model_type": ["x"]}', '{"text_config": {"architectures": "x"}}', "[]"]
)
def test_a_config_of_other_types_is_an_error_for_a_folder_and_a_note_for_a_file(tmp_path: Path, config: str) -> None:
    source = write_folder(tmp_path / "model", {"a.weight": torch.zeros(8, 8)})
    (source / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify_checkpoint(source, "2:4")
    assert verify_checkpoint(source / "model.safetensors", "2:4")
    assert any(
        "config.json next to model.safetensors is not used" in note for note in open_source(source / "model.safetensors").notes
    )


@pytest.mark.parametrize("weight_map", ["5", '{"a.weight": 5}', "{}", '["model-1.safetensors"]', '{"a.weight": null}'])
def test_an_index_of_other_types_is_an_error(tmp_path: Path, weight_map: str) -> None:
    save_file(STATE, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(CheckpointError, match=r"index\.json is not valid \(.*weight_map"):
        verify_checkpoint(tmp_path, "2:4")
