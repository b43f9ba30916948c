"""How every program handles its command line and errors that the user can fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorflow as tf
from absl import flags

from efficientnet_ns import config
from efficientnet_ns.benchmarks import registry
from efficientnet_ns.config import (
    Config,
    ConfigError,
    MakeConfig,
    command_line,
    fields,
    flag_files,
)


@pytest.mark.parametrize(
    ("cls", "name", "path"),
    [
        (MakeConfig, "source", "https://example.org/photos.zip"),
        (MakeConfig, "output_dir", "s3://bucket/records"),
        (Config, "label_data_dir", "gs://bucket/one;hdfs://host/two"),
    ],
)
def test_paths_of_unknown_file_systems_are_refused_at_the_door(cls, name, path):
    values = flags.FlagValues()
    fields.define_flags(cls, values)
    values(["program", f"--{name}={path}"])
    with pytest.raises(ConfigError, match=f"--{name}={path.split(';')[-1]}: a local path or gs://"):
        command_line._arguments([cls], values, [], words=False)


@pytest.mark.parametrize("path", ["gs://bucket/model", "/local/model", "tfds:mnist"])
def test_paths_of_known_file_systems_are_taken(path):
    values = flags.FlagValues()
    fields.define_flags(Config, values)
    values(["program", f"--label_data_dir={path}", "--tpu=grpc://10.0.0.1:8470"])
    (built,) = command_line._arguments([Config], values, [], words=False)
    assert built.data.label_data_dir == path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            tf.errors.FailedPreconditionError(
                None, None, "libcurl code 6 meaning 'Couldn't resolve host name'"
            ),
            2,
        ),
        (tf.errors.UnavailableError(None, None, "when reading metadata of gs://bucket/x"), 2),
        (tf.errors.AbortedError(None, None, "Error executing an HTTP request: HTTP 503"), 2),
        (tf.errors.UnimplementedError(None, None, "File system scheme 's3' not implemented"), 2),
        (tf.errors.UnavailableError(None, None, "worker 3 has left"), None),
        (tf.errors.FailedPreconditionError(None, None, "variable is uninitialized"), None),
    ],
)
def test_errors_of_remote_storage_are_one_line_and_others_are_not(error, code):
    def program():
        raise error

    if code is None:
        with pytest.raises(type(error)):
            command_line._exit_code(program)
    else:
        assert command_line._exit_code(program) == code


def test_memory_that_ran_out_is_one_line(caplog):
    text = "Graph execution error:\n\n  File main.py\n\nOOM when allocating tensor with shape[9,8] and type"

    def program():
        raise tf.errors.ResourceExhaustedError(None, None, text)

    assert command_line._exit_code(program) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("out of memory for a tensor with shape[9,8]: lower")
    assert "\n" not in record.getMessage()


def _parsed(tmp_path, content: bytes, *names: str):
    (tmp_path / "inner.flags").write_bytes(content)
    (tmp_path / "outer.flags").write_text(f"# outer\n--flagfile={tmp_path}/inner.flags\n")
    values = flags.FlagValues()
    fields.define_flags(MakeConfig, values)
    command_line._parse(values, ["program", f"--flagfile={tmp_path}/outer.flags"])
    return [values[name].value for name in names]


def test_a_flag_file_in_another_encoding_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        _parsed(tmp_path, "--source=a".encode("utf-16"))
    assert stopped.value.code == 2
    assert f"--flagfile={tmp_path}/inner.flags is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["", "# comment\n"])
def test_a_flag_file_may_begin_with_a_byte_order_mark(first, tmp_path):
    content = f"{first}--source=a b\n--seed=3\n".encode("utf-8-sig")
    assert _parsed(tmp_path, content, "source", "seed") == ["a b", 3]


def test_flag_files_are_read_where_they_stand(tmp_path, monkeypatch):
    """Later flags override, self-inclusions are read once, and presets need no repository."""
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "installed" / "flags" / "part.flags"
    preset.parent.mkdir(parents=True)
    preset.write_text("// a comment\n--seed=2\n\n")
    monkeypatch.setattr(flag_files, "presets", lambda: tmp_path / "installed")
    Path("own.flags").write_text(
        "--seed=1\n--flagfile=own.flags\n  --flagfile=flags/part.flags \n--a b\n"
    )
    words = ["x", "--flagfile", "own.flags", "--seed=3", "--", "--flagfile=own.flags"]
    expected = ["x", "--seed=1", "--seed=2", "--a b", "--seed=3", "--", "--flagfile=own.flags"]
    assert flag_files.expanded(words) == expected
    with pytest.raises(ConfigError, match="--flagfile=flags/pat.flags: no such file, here or in"):
        flag_files.expanded(["--flagfile=flags/pat.flags"])
    with pytest.raises(ConfigError, match="--flagfile requires the path"):
        flag_files.expanded(["--flagfile"])


@pytest.mark.parametrize("quoted", ['"my photos"', "'my photos'"])
def test_quotes_that_would_be_part_of_a_value_are_refused(quoted, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _parsed(tmp_path, f"--source={quoted}\n".encode())
    assert f"--source={quoted}: quotes in a flag file are part" in capsys.readouterr().err


def test_two_flags_on_one_line_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        _parsed(tmp_path, b"--source=photos --output_dir=records\n")
    told = capsys.readouterr().err
    assert "--output_dir is not on a separate line" in told
    assert "--source, 'photos --output_dir=records'" in told


def test_a_negative_seed_is_refused_by_every_program():
    for name in ("DemoConfig", "MakeConfig", "SvhnConfig", "Config"):
        cls = getattr(config, name)
        values = flags.FlagValues()
        fields.define_flags(cls, values)
        values(["program", "--seed=-1"])
        with pytest.raises(ConfigError, match="--seed=-1 is too small"):
            fields.from_flags(cls, values)


@pytest.mark.parametrize("argument", ["--help", "--help=1", "-help=true"])
def test_help_with_a_value_is_help(argument, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["program", argument])
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda options: None, MakeConfig)
    assert stopped.value.code == 0
    assert "--output_dir" in capsys.readouterr().out


def test_a_benchmark_without_its_subject_lists_the_choices():
    with pytest.raises(ConfigError, match="--what is required: one of input, train"):
        registry.run(config.BenchmarkConfig())
