"""The commands of docs/checkpoints.md that need no PyTorch; those of tests/parity are all of them."""

from tests.checkpoints import page, stand_ins


def test_commands_as_written(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_ins.make_all(tmp_path)
    # Refused by its name, before it is opened.
    release = tmp_path / "llava-v1.5-7b"
    (release / "model.safetensors").rename(release / "pytorch_model.bin")
    steps = [step for step in page.steps(repository / "docs" / "checkpoints.md") if not step.needs_torch]
    assert len(steps) > 25
    for step in steps:
        capsys.readouterr()
        step.run()
        printed = capsys.readouterr()
        step.check(printed.out + printed.err)
