"""Which URLs and which addresses media may be fetched from."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pipeline.media.addresses import Refused, Target, is_public, parse_target, redirected

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.1",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2606:4700:4700::1111",
    "2a00:1450:4001:80b::200e",
    "64:ff9b::8.8.8.8",  # NAT64 to a public address
]
CLOSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.0",
    "10.255.255.255",
    "100.64.0.0",  # carrier-grade NAT
    "100.100.100.200",  # Alibaba's metadata
    "100.127.255.255",
    "127.0.0.0",
    "127.0.0.1",
    "127.255.255.255",
    "168.63.129.16",  # Azure's platform
    "169.254.0.1",
    "169.254.169.254",  # metadata of AWS, Google, Azure
    "169.254.170.2",  # of ECS tasks
    "172.16.0.0",
    "172.17.0.1",  # Docker's bridge
    "172.31.255.255",
    "192.0.0.192",  # Oracle's metadata
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.0",
    "192.168.255.255",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.255",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::2",
    "::127.0.0.1",  # IPv4-compatible
    "::8.8.8.8",
    "::ffff:127.0.0.1",  # IPv4-mapped
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:7f00:1",
    "::ffff:8.8.8.8",  # nobody has to write it so
    "::ffff:0:127.0.0.1",  # IPv4-translated
    "64:ff9b::127.0.0.1",  # NAT64
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::1",  # local NAT64
    "100::1",  # discard
    "2001::1",  # Teredo
    "2001:0:7f00:1::1",
    "2001:2::1",  # benchmarks
    "2001:10::1",  # ORCHID
    "2001:1ff:ffff::1",
    "2001:db8::1",
    "2002:7f00:1::1",  # 6to4 of 127.0.0.1
    "2002:a9fe:a9fe::1",
    "2002:808:808::1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",  # AWS's metadata
    "fd20:ce::254",  # Google's
    "fdff:ffff::1",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]
NO_ADDRESSES = [
    "",
    "localhost",
    "1.1.1",
    "1.1.1.1.",
    "01.1.1.1",
    "0x1.1.1.1",
    "16843009",
    "[::1]",
    "1.1.1.1:80",
    "١.1.1.1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", CLOSED + NO_ADDRESSES)
def test_not_public(address: str) -> None:
    assert not is_public(address)


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_nothing_is_public_that_python_knows_to_be_special(address: ipaddress.IPv4Address) -> None:
    if is_public(str(address)) and address not in ipaddress.ip_network("64:ff9b::/96"):
        assert not (
            address.is_private
            or address.is_loopback
            or address.is_link_local
            or address.is_multicast
            or address.is_reserved
            or address.is_unspecified
        )


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://a.example.org", Target("http://a.example.org/", "a.example.org", 80, False)),
        ("HTTPS://A.Example.ORG/Bild.png", Target("https://a.example.org/Bild.png", "a.example.org", 443, False)),
        ("https://a.org:443/x", Target("https://a.org/x", "a.org", 443, False)),
        ("http://a.org:8080?q=1#part", Target("http://a.org:8080/?q=1", "a.org", 8080, False)),
        ("http://a.org/ä/%2e%2e/b?c=ü", Target("http://a.org/%C3%A4/%2e%2e/b?c=%C3%BC", "a.org", 80, False)),
        ("https://s3.x.org/k?sig=a%2Fb+c=", Target("https://s3.x.org/k?sig=a%2Fb+c=", "s3.x.org", 443, False)),
        ("http://a.org/@b", Target("http://a.org/@b", "a.org", 80, False)),
        ("http://a.org?@evil.org", Target("http://a.org/?@evil.org", "a.org", 80, False)),
        (
            "http://xn--bcher-kva.example.net/",
            Target("http://xn--bcher-kva.example.net/", "xn--bcher-kva.example.net", 80, False),
        ),
        ("http://8.8.8.8/", Target("http://8.8.8.8/", "8.8.8.8", 80, True)),
        ("http://[2606:4700::1111]:8443/", Target("http://[2606:4700::1111]:8443/", "2606:4700::1111", 8443, True)),
        ("http://[::FFFF:127.0.0.1]/", Target("http://[::ffff:127.0.0.1]/", "::ffff:127.0.0.1", 80, True)),
        ("http://1.1.1.1.nip.io/", Target("http://1.1.1.1.nip.io/", "1.1.1.1.nip.io", 80, False)),
    ],
)
def test_urls(url: str, target: Target) -> None:
    assert parse_target(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.org/x.png",
        "//a.org/x.png",
        "ftp://a.org/x",
        "file:///etc/passwd",
        "gopher://a.org/",
        "http:/a.org/",
        "http:a.org",
        "http:///a.org",
        "http://",
        "http://:80/",
        "http://?x",
        " http://a.org/",
        "http://a.org/ b",
        "http://a.org/\n",
        "http://a.org/\r\nHost: b.org",
        "http://a.org\t/",
        "http://a.org/\x00",
        "http://a.org/\u2028",
        "http://a.org\\@b.org/",
        "http://a.org/\\..",
        # users, passwords
        "http://user@a.org/",
        "http://user:pass@a.org/",
        "http://a.org:80@127.0.0.1/",
        "http://@127.0.0.1/",
        # ports
        "http://a.org:/",
        "http://a.org:0/",
        "http://a.org:22/",
        "http://a.org:25/",
        "http://a.org:81/",
        "http://a.org:1023/",
        "http://a.org:65536/",
        "http://a.org:123456/",
        "http://a.org:+80/",
        "http://a.org:8_0/",
        "http://a.org:８０/",
        # other spellings of addresses
        "http://2130706433/",
        "http://017700000001/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://127.0.0.01/",
        "http://127.1/",
        "http://127.0.1/",
        "http://127.0.0.0x1/",
        "http://127.0.0.1./",
        "http://127.0.0.256/",
        "http://1.2.3.4.5/",
        "http://a.0x/",
        "http://a.127/",
        "http://0/",
        "http://[::1/",
        "http://::1/",
        "http://[::1%25eth0]/",
        "http://[::1%eth0]/",
        "http://[v1.fe80]/",
        "http://[127.0.0.1]/",
        "http://[:::1]/",
        "http://[]/",
        # digits and dots of other scripts, letters that lower-case to ASCII
        "http://１２７.0.0.1/",
        "http://①②⑦.⓪.⓪.①/",
        "http://127。0。0。1/",
        "http://127．0．0．1/",
        "http://bücher.example.net/",
        "http://\u212aelvin.example.net/",
        "http://a%2eorg/",
        "http://%31%32%37.0.0.1/",
        "http://127.0.0.1%00.a.org/",
        # names that are none, or stand for something near
        "http://localhost/",
        "http://LOCALHOST/",
        "http://localhost./",
        "http://a.localhost/",
        "http://redis/",
        "http://metadata.google.internal/",
        "http://printer.local/",
        "http://svc.ns.svc.cluster.local/",
        "http://router.lan/",
        "http://nas.home.arpa/",
        "http://x.corp/",
        "http://a.org./",
        "http://.a.org/",
        "http://a..org/",
        "http://-a.org/",
        "http://a-.org/",
        "http://" + "a" * 64 + ".org/",
        "http://" + "a." * 126 + "org/",
        "http://a.org/" + "x" * 4096,
    ],
)
def test_refused_urls(url: str) -> None:
    with pytest.raises(Refused):
        parse_target(url)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/b", "https://a.org/b"),
        ("b", "https://a.org/x/b"),
        ("?c", "https://a.org/x/y?c"),
        ("//b.org/c", "https://b.org/c"),
        ("http://b.org", "http://b.org/"),
        ("", "https://a.org/x/y?z"),
    ],
)
def test_redirects(location: str, url: str) -> None:
    assert redirected(parse_target("https://a.org/x/y?z"), location).url == url


@pytest.mark.parametrize(
    "location",
    [
        "//u@b.org/",
        "file:///etc/passwd",
        "data:image/png;base64,AA==",
        "javascript:1",
        "http://[",
        "//127.1/",
        "\\\\b",
        "//redis",
    ],
)
def test_refused_redirects(location: str) -> None:
    with pytest.raises(Refused):
        redirected(parse_target("https://a.org/x"), location)


@given(st.text(max_size=40), st.sampled_from(["", "http://", "https://a.org", "http://[", "http://127.0.0.1"]))
def test_whatever_the_url_is_it_is_plain_or_refused(text: str, before: str) -> None:
    try:
        target = parse_target(before + text)
    except Refused as refused:
        assert str(refused)
        return
    assert target.url.isascii()
    assert target.url.isprintable()
    assert "@" not in target.url.split("/")[2]
    assert parse_target(target.url) == target
