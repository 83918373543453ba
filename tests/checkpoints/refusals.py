"""What every refusal has in common, seen from the command line."""

import hashlib

from phantom_jax import cli


def everything(folder):
    """All below a folder: names, and contents of files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(capsys, folder, arguments, *texts):
    """Runs a verb that must fail: exit code 2, one message that holds `texts`, nothing changed below `folder`."""
    before = everything(folder)
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code == 2, said
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("error:") == 1, said
    for text in texts:
        assert str(text) in said.err, said.err
    assert everything(folder) == before
    return said.err
