"""Everything around a body: headers, paths, framing, several requests at once, and what isn't HTTP."""

from __future__ import annotations

import random

from hostile import Attack, Target, dumped, good, request
from hostile_bodies import mangled

_ODD_HEADERS: tuple[str, ...] = (
    "x-request-id: a b",
    "x-request-id: " + "x" * 2000,
    "x-request-id: ${jndi:ldap://x}",
    "x-request-id:",
    "x-request-id: \xe9",
    "x-request-timeout-seconds: nan",
    "x-request-timeout-seconds: -1",
    "x-request-timeout-seconds: 1e999",
    "x-request-timeout-seconds: 0x1",
    "x-request-priority: 9",
    "x-request-priority: -1",
    "x-request-priority: ",
    "x-request-priority: \xb2",
    "x-session-id: \xff\xfe",
    "x-session-id: " + "s" * 6000,
    "traceparent: 00-0-0-0",
    "traceparent: " + "0" * 5000,
    "tracestate: " + "a=b," * 2000,
    "traceparent: 00-" + "f" * 32 + "-" + "f" * 16 + "-zz",
    "authorization: Basic eDp5",
    "authorization: Bearer",
    "authorization: bearer  ",
    "x-api-key: ",
    "x-api-key: tandem__",
    "x-api-key: " + "k" * 6000,
    "x-api-key: tandem_\xff_\xff",
    "cookie: " + "c" * 7000,
    "expect: 100-continue",
    "expect: 200-ok",
    "range: bytes=0-1",
    "accept: nonsense",
    "accept-encoding: gzip;q=x",
    "te: trailers",
    "upgrade: websocket",
    "upgrade: h2c",
    "http2-settings: AAMAAABkAAQAAP__",
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    "connection: upgrade",
    "connection: authorization",
    "connection: content-length",
    "proxy-connection: keep-alive",
    "keep-alive: timeout=99999",
    "x-forwarded-for: 127.0.0.1",
    "x-forwarded-proto: \xff",
    "x-forwarded-host: evil",
    'forwarded: for="[::1]"',
    "x-http-method-override: DELETE",
    "serve_multiplexed_model_id: ../x",
    "x-serve-app: x",
    "host: other",
    "host: ",
    "content-type: application/json; charset=utf-7",
    "\x7f: x",
    "a" * 3000 + ": x",
    "x: " + "y" * 20_000,
    " folded: x",
    "x:\tx",
    "x : x",
    ": x",
    "noColon",
    "x: a\x00b",
    "x: a\nb: c",
    "x: a\rb",
    "\xff: x",
)
_METHODS = (
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "POST",
    "PRI",
    "get",
    "G" * 300,
    "P\x00ST",
    "PO ST",
    "",
)


def headers(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """Odd headers, far too many, twice the same, in any order; and methods that aren't."""
    odd = [dice.choice(_ODD_HEADERS) for _ in range(dice.choice((1, 1, 2, 3)))]
    if dice.random() < 0.06:
        odd = [f"x-{number}: y" for number in range(dice.choice((50, 101, 2000)))]
    if dice.random() < 0.1:
        odd += [dice.choice(headers)] * 2
    mixed = [*headers, *odd]
    dice.shuffle(mixed)
    method = dice.choice(_METHODS) if dice.random() < 0.3 else "POST"
    body = dumped(target.predict)
    return Attack("headers", (request(method, f"/v1/models/{target.name}:predict", mixed, body),))


def path(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """Paths that mean one thing to one parser and another to the next, or nothing at all."""
    name = target.name
    forms = (
        f"/v2/models/{name}",
        f"/v2/models/{name}/ready",
        f"/v2/models/{name}/infer",
        f"/v1/models/{name}:predict",
        f"/v2/models/{name}/versions/1/infer",
        f"/v2/models/{name}/versions/{'9' * 400}",
        "/v2",
        "/metrics",
        "/openapi.json",
        "/",
        "/-/healthz",
        "/-/routes",
        "/-/nothing",
        "/-kinds",
        "/v2/health/ready",
        "/docs",
        "/v2/repository/index",
    )
    path = dice.choice(forms)
    tricks = (
        "%2e%2e/",
        "..%2f",
        "//",
        "/./",
        "/../",
        "%00",
        "%ff",
        "%",
        "%2",
        "%zz",
        ";a=b",
        "?x=1&x",
        "#f",
        "\\",
        "\xe9",
        "%c3%28",
        "%0d%0a",
        "*",
    )
    for _ in range(dice.choice((0, 1, 1, 2))):
        at = dice.randrange(len(path) + 1)
        path = path[:at] + dice.choice(tricks) + path[at:]
    luck = dice.random()
    if luck < 0.08:
        path = dice.choice(
            (
                "http://evil.example/v2",
                "//evil.example/v2",
                "*",
                "",
                "x",
                "file:///etc/passwd",
                "/" + "a" * 70_000,
                "evil:443",
            )
        )
    elif luck < 0.2:
        path = "".join(f"%{ord(c):02x}" if dice.random() < 0.3 and c != "/" else c for c in path)
    body = b"" if dice.random() < 0.5 else dumped(target.infer)
    return Attack("path", (request(dice.choice(_METHODS[:9]), path, headers, body),))


def framing(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """Lengths and chunks about which two parsers might not agree: how requests are smuggled."""
    path, body = f"/v1/models/{target.name}:predict", dumped(target.predict)
    size = len(body)
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (size, body)
    hidden = request("POST", "/v2/models/hidden/infer", ["host: x"], b"{}")
    framings: tuple[tuple[list[str], bytes], ...] = (
        ([f"content-length: {size}", f"content-length: {size}"], body),
        ([f"content-length: {size}", f"content-length: {size + 1}"], body),
        ([f"content-length: {size}, {size}"], body),
        ([f"content-length: +{size}"], body),
        ([f"content-length: {size:#x}"], body),
        ([f"content-length: {size}\x0b"], body),
        (["content-length: -1"], body),
        ([f"content-length: {2**64 + size}"], body),
        (["content-length: "], body),
        ([f"content-length: {10**15}"], body),
        (["content-length: 4"], body + hidden),
        (["transfer-encoding: chunked"], whole),
        (["transfer-encoding: chunked", f"content-length: {size}"], whole),
        (["transfer-encoding: chunked", "content-length: 4"], whole + hidden),
        (["transfer-encoding: chunked", "transfer-encoding: identity"], whole),
        (["transfer-encoding: xchunked"], whole),
        (["transfer-encoding: gzip, chunked"], whole),
        (["transfer-encoding : chunked"], whole),
        (["transfer-encoding:\x0bchunked"], whole),
        (["transfer-encoding: chunked"], b"0\r\n\r\n" + hidden),
        (["transfer-encoding: chunked"], b"%x;%s\r\n%s\r\n0\r\n\r\n" % (size, b"e" * 5000, body)),
        (["transfer-encoding: chunked"], b"ffffffffffffffff\r\n" + body),
        (["transfer-encoding: chunked"], b"10000000000000000%x\r\n%s\r\n0\r\n\r\n" % (size, body)),
        (["transfer-encoding: chunked"], b"-1\r\n" + body),
        (["transfer-encoding: chunked"], b"%x\n%s\n0\n\n" % (size, body)),
        (
            ["transfer-encoding: chunked"],
            b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\nx: y\r\n\r\n",
        ),
        (["transfer-encoding: chunked"], b"%x\r\n%s\r\n0\r\ncontent-length: 9\r\n\r\n" % (size, body)),
    )
    lines, sent = dice.choice(framings)
    return Attack("framing", (request("POST", path, [*headers, *lines], sent, measured=False),))


def pipeline(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """Several requests on one connection at once, one of them perhaps bad."""
    kept = [line for line in headers if not line.startswith("connection")]
    first = [
        request("POST", f"/v1/models/{target.name}:predict", kept, dumped(target.predict)),
        request("GET", "/v2/health/ready", kept),
        request("POST", f"/v2/models/{target.name}/infer", kept, mangled(dice, target.infer)),
        request("GET", "/nowhere", kept),
        request("POST", f"/v2/models/{target.name}/infer", kept, b"x" * dice.choice((1, 200_000))),
    ]
    some = dice.choices(first, k=dice.randrange(1, 12))
    return Attack("pipeline", (b"".join(some) + good(target),))


def garbage(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """Other protocols, noise, and good requests with bytes flipped."""
    luck = dice.random()
    if luck < 0.4:
        fixed = (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + dice.randbytes(60),
            b"GET /\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.0\r\n\r\n",
            b"\r\n\r\n\r\n",
            b"SSH-2.0-x\r\n",
            dice.randbytes(500),
        )
        return Attack("garbage", (dice.choice(fixed),), "half-close")
    whole = bytearray(request("POST", f"/v2/models/{target.name}/infer", headers, dumped(target.infer)))
    for _ in range(dice.choice((1, 1, 3, 20))):
        whole[dice.randrange(len(whole))] = dice.randrange(256)
    return Attack("flipped", (bytes(whole),), "half-close")
