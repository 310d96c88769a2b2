"""Options that do not fit, told in words."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from fleecer.block.options import BlockdevOptions
from fleecer.block.schema import explain
from fleecer.monitor.commands import BackupAction


@pytest.mark.parametrize(
    ("kind", "document", "told"),
    [
        (BlockdevOptions, '{"driver": "vmdk"}', "driver 'vmdk' is not known; known are copy-before-write, "),
        (BlockdevOptions, '{"driver": 3}', "driver is 3; it must be text"),
        (BlockdevOptions, "{}", "option driver is missing"),
        (BlockdevOptions, "[]", "what is given is a list; it must be an object"),
        (BlockdevOptions, '{"driver": "raw", "file": 3}', "file is 3; it must be text or an object"),
        (BlockdevOptions, '{"driver": "raw", "file": {"driver": "x"}}', "file.driver 'x' is not known; known are "),
        (
            BlockdevOptions,
            '{"driver": "raw", "file": {"driver": "file", "filename": "f", "x": 1}}',
            "option 'x' in file is not known; known are auto-read-only, discard, ",
        ),
        (
            BlockdevOptions,
            '{"driver": "fault", "file": "f", "rules": [{"operation": "read"}, {"operation": "read", "errno": 0}]}',
            "rules[1].errno is 0; it must be a whole number from 1 to 4095",
        ),
        (
            BlockdevOptions,
            '{"driver": "copy-before-write", "file": "a", "target": "b", "cbw-timeout": -1}',
            "cbw-timeout is -1; it must be a number from 0 to 86400",
        ),
        (BlockdevOptions, '{"driver": "throttle", "file": "a", "iops-total": -1}', "it must be a number of at least 0"),
        (
            BlockdevOptions,
            '{"driver": "null-co", "read-zeroes": "on"}',
            "read-zeroes is 'on'; it must be true or false",
        ),
        (list[BackupAction], '[{"type": "x"}]', "[0].type 'x' is not known; known are blockdev-backup"),
        (
            list[BackupAction],
            '[{"type": "blockdev-backup", "data": {"device": "a", "target": "b", "sync": "top"}}]',
            "[0].data.sync is 'top'; it must be one of full, none",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_place_value_and_limit(kind: Any, document: str, told: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(document, type=kind)
    text = explain(caught.value, kind, json.loads(document))
    assert told in text
    assert "$" not in text
