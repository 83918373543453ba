"""All commands of docs/checkpoints.md, with pickles as PyTorch writes them, and with transformers and PEFT."""

import torch
from safetensors.torch import load_file

from tests.checkpoints import page, stand_ins


def pickled(folder, stem):
    torch.save(load_file(folder / f"{stem}.safetensors"), folder / f"{stem}.bin")
    (folder / f"{stem}.safetensors").unlink()


def test_all_commands_as_written(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_ins.make_all(tmp_path)
    for name, stem in (
        ("llava-v1.5-7b", "model"),
        ("llava-v1.5-7b-lora", "adapter_model"),
        ("llava-v1.5-7b-lora", "non_lora_trainables"),
        ("pretrain", "mm_projector"),
    ):
        pickled(tmp_path / name, stem)
    (tmp_path / "llava-v1.5-7b" / "model.bin").rename(tmp_path / "llava-v1.5-7b" / "pytorch_model.bin")
    steps = page.steps(repository / "docs" / "checkpoints.md")
    assert {step.language for step in steps} == {"bash", "python"}
    for step in steps:
        capsys.readouterr()
        step.run()
        printed = capsys.readouterr()
        step.check(printed.out + printed.err)
