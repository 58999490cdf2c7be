"""Files that appear whole, and names that stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.system.files import beside, plain_name


@pytest.mark.parametrize(
    "name", ["a", "__0_0.distcp", ".metadata", "model-00001-of-00002.safetensors", "...", "a\\b"]
)
def test_a_plain_name_is_of_a_file_beside(name: str) -> None:
    assert beside(Path("folder/index.json"), name) == Path("folder") / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/x", "a/b", "./a", "a/", "a\0", None, 3, ["a"], "../" * 400]
)
def test_any_other_is_refused_by_the_file_that_names_it(name: object) -> None:
    assert not plain_name(name)
    with pytest.raises(ValueError, match=r"^folder/index.json names ") as caught:
        beside(Path("folder/index.json"), name)
    assert len(str(caught.value)) < 300
