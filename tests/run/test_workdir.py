"""What a workdir says when its configuration cannot be read."""

import pytest

from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "config.json: holds no configuration, but null"),
        ("[]", r"config.json: holds no configuration, but \[\]"),
        ("", "config.json: is no JSON"),
        ('{"steps": ', "config.json: is no JSON"),
        ("{}", "config.json: says of no layer what it is"),
        ('{"steps": "x"}', "config.steps='x': expected a whole number"),
    ],
)
def test_a_config_that_is_none_is_one_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        Workdir(tmp_path).read_config()
    assert "\n" not in str(refused.value)


def test_a_folder_without_one_is_named_as_it_is(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}: no config.json there"):
        Workdir(tmp_path).read_config()
    with pytest.raises(UserError, match=rf"^{tmp_path}: no finished checkpoint there yet"):
        Workdir(tmp_path).step(None)
