"""Names of backing files: where an image's header may lead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleecer.errors import UnsupportedFormat
from fleecer.storage.paths import file_identity, resolve_backing


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    (directory / "below").mkdir(parents=True)
    (directory / "base.raw").touch()
    return directory


@pytest.mark.parametrize("named", ["base.raw", "./base.raw", "below/../base.raw", "{images}/base.raw"])
def test_names_in_the_images_directory_are_allowed(images: Path, named: str) -> None:
    found = resolve_backing(str(images / "disk.qcow2"), named.format(images=images))
    assert found == str(images / "base.raw")


def test_a_name_is_relative_to_where_the_image_really_is(images: Path, tmp_path: Path) -> None:
    (images / "disk.qcow2").touch()
    (tmp_path / "link.qcow2").symlink_to(images / "disk.qcow2")
    assert resolve_backing(str(tmp_path / "link.qcow2"), "base.raw") == str(images / "base.raw")


def test_a_name_that_leads_nowhere_yet_is_still_a_name(images: Path) -> None:
    assert resolve_backing(str(images / "disk.qcow2"), "absent.raw") == str(images / "absent.raw")


@pytest.mark.parametrize("named", ["../secret", "/etc/passwd", "{images}2/base", "below/../../secret", "link"])
def test_names_that_lead_outside_are_refused_with_what_would_allow_them(
    images: Path, tmp_path: Path, named: str
) -> None:
    (images / "link").symlink_to(tmp_path / "secret")
    named = named.format(images=images)
    with pytest.raises(UnsupportedFormat) as caught:
        resolve_backing(str(images / "disk.qcow2"), named)
    text = str(caught.value)
    assert text.startswith(f"image '{images}/disk.qcow2': its backing file '{named}' is outside '{images}'; ")
    directory = os.path.dirname(os.path.realpath(os.path.join(images, named)))
    assert text.endswith(f"--allow-backing '{directory}' would allow it")
    assert resolve_backing(str(images / "disk.qcow2"), named, [directory])


def test_a_neighbour_with_a_longer_name_is_not_inside(images: Path, tmp_path: Path) -> None:
    (tmp_path / "images-too").mkdir()
    with pytest.raises(UnsupportedFormat):
        resolve_backing(str(images / "disk.qcow2"), "../images-too/base.raw")


def test_a_directory_that_was_allowed_may_be_a_link(images: Path, tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "leave").symlink_to(tmp_path / "bases")
    found = resolve_backing(str(images / "disk.qcow2"), "../bases/base.raw", [str(tmp_path / "leave")])
    assert found == str(tmp_path / "bases" / "base.raw")


@pytest.mark.parametrize(
    "named", ["json:{}", "nbd://host/", "nbd+unix:///x?socket=y", "file:base.raw", "NBD:host:10809", "fat:rw:below"]
)
def test_a_header_may_name_no_protocol(images: Path, named: str) -> None:
    with pytest.raises(UnsupportedFormat, match="has a protocol prefix, which a header may not use"):
        resolve_backing(str(images / "disk.qcow2"), named, ["/"])


@pytest.mark.parametrize("named", ["", "base\0raw"])
def test_what_is_no_name_is_refused(images: Path, named: str) -> None:
    with pytest.raises(UnsupportedFormat, match="is no file name"):
        resolve_backing(str(images / "disk.qcow2"), named)


def test_a_name_cannot_smuggle_control_characters_into_a_message(images: Path) -> None:
    with pytest.raises(UnsupportedFormat) as caught:
        resolve_backing(str(images / "disk.qcow2"), "../\x1b[2Jx\n/\x07y")
    assert str(caught.value).isprintable()


def test_one_file_has_one_identity_whatever_its_names(images: Path) -> None:
    os.link(images / "base.raw", images / "hard.raw")
    (images / "soft.raw").symlink_to("base.raw")
    (images / "other.raw").touch()
    identities = [file_identity(str(images / name)) for name in ("base.raw", "hard.raw", "soft.raw")]
    assert identities[0] is not None
    assert identities == [identities[0]] * 3
    assert file_identity(str(images / "other.raw")) not in (None, identities[0])
    assert file_identity(str(images / "absent")) is None
