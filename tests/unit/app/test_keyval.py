"""QEMU's option syntax."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fleecer.app import keyval
from fleecer.block.options import BlockdevOptions
from fleecer.errors import UsageError


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("driver=raw,node-name=a", {"driver": "raw", "node-name": "a"}),
        (
            "driver=raw,file.driver=file,file.filename=/x",
            {"driver": "raw", "file": {"driver": "file", "filename": "/x"}},
        ),
        ("a=x,,y,b=z", {"a": "x,y", "b": "z"}),
        ("a=,,,b=z", {"a": ",", "b": "z"}),
        ("a=x,", {"a": "x"}),
        ("a=", {"a": ""}),
        ("a=b=c", {"a": "b=c"}),
        ("a=1,a=2", {"a": "2"}),
        ('{"driver": "raw", "file": {"read-only": true}}', {"driver": "raw", "file": {"read-only": True}}),
    ],
)
def test_options_become_a_tree(text: str, tree: dict[str, Any]) -> None:
    assert keyval.parse(text) == tree


def test_the_first_key_may_be_implied() -> None:
    assert keyval.parse("nbd,id=x", implied_key="type") == {"type": "nbd", "id": "x"}
    assert keyval.parse("type=nbd,id=x", implied_key="type") == {"type": "nbd", "id": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raw", "option 'raw' in 'raw' is not of the form key=value"),
        ("a=1,b", "option 'b' in 'a=1,b' is not of the form key=value"),
        ("", "option '' in '' is not of the form key=value"),
        ("a=1,=2", "key '' in 'a=1,=2' is not made of names joined by dots"),
        ("a..b=1", "key 'a..b' in 'a..b=1' is not made of names joined by dots"),
        ("a=1,a.b=2", "key 'a' in 'a=1,a.b=2' has a value, and so can have nothing below it"),
        ("a.b=1,a=2", "key 'a' in 'a.b=1,a=2' has keys below it, and so can have no value"),
        ("{", "options '{' are no JSON: Input data was truncated"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        keyval.parse(text)
    assert str(caught.value) == message


def test_on_and_off_are_booleans_where_the_structure_has_one() -> None:
    tree = keyval.parse(
        "driver=raw,read-only=on,node-name=on,file.driver=file,file.filename=off,file.auto-read-only=no"
    )
    options = msgspec.convert(keyval.typed(tree, BlockdevOptions), type=BlockdevOptions, strict=False)
    assert options.read_only is True
    assert options.node_name == "on"
    assert tree["file"] == {"driver": "file", "filename": "off", "auto-read-only": "no"}
    assert keyval.typed(tree, BlockdevOptions)["file"] == {"driver": "file", "filename": "off", "auto-read-only": False}


def test_another_text_for_a_boolean_is_refused() -> None:
    with pytest.raises(UsageError, match="option read-only is 'maybe'; it must be on or off"):
        keyval.typed({"read-only": "maybe"}, BlockdevOptions)
