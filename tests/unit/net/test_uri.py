"""NBD URIs."""

from __future__ import annotations

import os

import pytest

from fleecer.net.uri import tcp_uri, unix_uri


@pytest.mark.parametrize(
    ("export", "encoded"),
    [("web", "web"), ("web@s1", "web@s1"), ("a b", "a%20b"), ("a/b", "a%2Fb"), ("é%", "%C3%A9%25")],
)
def test_names_are_percent_encoded(export: str, encoded: str) -> None:
    assert unix_uri("/run/x&y/nbd.sock", export) == f"nbd+unix:///{encoded}?socket=/run/x%26y/nbd.sock"
    assert tcp_uri("127.0.0.1", 10809, export) == f"nbd://127.0.0.1:10809/{encoded}"


def test_a_socket_is_named_by_its_absolute_path() -> None:
    assert unix_uri("nbd.sock", "a") == f"nbd+unix:///a?socket={os.getcwd()}/nbd.sock"


def test_an_ipv6_address_is_bracketed() -> None:
    assert tcp_uri("::1", 1, "a") == "nbd://[::1]:1/a"
