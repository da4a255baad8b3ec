"""Carries messages and pictures between the head and its workers: Celery on Redis or Valkey.

The only module that knows Celery. It carries, and decides nothing: a message may be lost, come late
or come twice. Order, retries and what is valid are the head's, which compares what each worker says
it holds with its own records.

- To a worker: Celery tasks in a queue of that worker, which a Celery worker consumes.
- To the head: messages of Celery's transport (kombu) in the queue HEAD.
- Pictures: keys of Redis with a time to live, because they are large and need no JSON around them.
- Whether there is a head: a key with a time to live. Workers send nothing while it is missing, so
  that queues stay short.

JSON alone is accepted; nothing is unpickled.
"""

import json
import logging
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis
from celery import Celery
from celery.worker import state
from kombu import Connection, Consumer, Exchange, Queue
from kombu.exceptions import KombuError
from kombu.mixins import ConsumerMixin

log = logging.getLogger(__name__)
logging.getLogger("kombu.mixins").setLevel(logging.ERROR)
"""Else a traceback for each lost connection."""

PREFIX = "mflux."
HEAD = f"{PREFIX}head"
PRESENCE = f"{PREFIX}presence"
TASK = f"{PREFIX}message"
BLOB_S = 3600
"""Seconds after which a picture that nobody has taken is removed."""
RECONNECT_S = 1.0
RECONNECT = 75
"""Why a Celery worker stops that another one follows: EX_TEMPFAIL."""
_NO_LIMIT = 0
"""Of unacknowledged messages: a message that cannot be acknowledged, because the broker is away,
counts as one from then on. With a limit of one, the worker would get no other message."""
CONNECT_S = 3.0
ANSWER_S = 10.0
"""Longest wait for an answer of the broker."""
ERRORS = (redis.RedisError, KombuError, OSError)


class CarrierUnavailable(Exception):
    """The broker cannot be reached, or refuses. The message is the reason."""


class _Connection(Connection):  # type: ignore[misc]
    """Reconnects each RECONNECT_S; kombu waits up to 30 s after a long outage."""

    def ensure_connection(self, errback: Any = None, max_retries: Any = None, **more: Any) -> Any:
        pauses = dict.fromkeys(("interval_start", "interval_max"), RECONNECT_S)
        return super().ensure_connection(
            errback, max_retries, **{**more, **pauses, "interval_step": 0.0}
        )


class Carrier:
    """Any thread may send.

    Args:
        url: of the broker: redis://:PASSWORD@HOST:PORT/DB, or rediss:// for TLS, then perhaps with
            ?ssl_ca_certs=FILE.
    """

    def __init__(self, url: str) -> None:
        self.url, tls = split_tls(url)
        self._redis = redis.Redis.from_url(
            self.url,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=CONNECT_S,
            socket_keepalive=True,
            health_check_interval=10,
            **tls,
        )
        self._app = Celery("mflux", broker=self.url, set_as_current=False)
        self._app.amqp.Connection = _Connection
        self._app.conf.update(
            accept_content=["json"],
            task_serializer="json",
            task_ignore_result=True,
            task_acks_late=True,
            task_create_missing_queues=True,
            worker_prefetch_multiplier=_NO_LIMIT,
            worker_enable_remote_control=False,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
            worker_cancel_long_running_tasks_on_connection_loss=False,
            broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None,
            broker_use_ssl=tls or None,
            broker_transport_options={
                "socket_timeout": ANSWER_S,
                "socket_connect_timeout": CONNECT_S,
                "socket_keepalive": True,
                "health_check_interval": 10,
                "visibility_timeout": BLOB_S,
            },
        )
        self._receiver: _Receiver | None = None

    # -- the head ---------------------------------------------------------------------------------

    def send(self, worker: str, message: dict[str, Any]) -> None:
        """Send a message to a worker. Raises: CarrierUnavailable."""
        with _refusals():
            self._app.send_task(TASK, args=[message], queue=queue_of(worker), retry=False)

    def announce(self, presence: dict[str, Any], seconds: float) -> None:
        """There is a head, for so many seconds from now. Raises: CarrierUnavailable."""
        with _refusals():
            self._redis.set(PRESENCE, json.dumps(presence), px=int(seconds * 1000))

    def leave(self) -> None:
        """There is no head any more. Raises: CarrierUnavailable."""
        with _refusals():
            self._redis.delete(PRESENCE)

    def forget(self, worker: str | None = None) -> None:
        """Remove all messages to a worker (None: to the head). Raises: CarrierUnavailable."""
        with _refusals():
            self._redis.delete(HEAD if worker is None else queue_of(worker))

    def receive(self, handle: Callable[[Any], None]) -> None:
        """Handle each message to the head, until stop(). Reconnects by itself."""
        with self._app.connection_for_read() as connection:
            self._receiver = _Receiver(connection, handle)
            self._receiver.run()

    def stop(self) -> None:
        """End receive()."""
        if self._receiver:
            self._receiver.should_stop = True

    # -- a worker ---------------------------------------------------------------------------------

    def presence(self) -> dict[str, Any] | None:
        """What the head says of itself. Raises: CarrierUnavailable."""
        with _refusals():
            found = self._redis.get(PRESENCE)
        return json.loads(found) if found else None

    def publish(self, message: dict[str, Any]) -> None:
        """Send a message to the head. Raises: CarrierUnavailable."""
        with _refusals(), self._app.producer_or_acquire() as producer:
            producer.publish(message, exchange="", routing_key=HEAD, serializer="json", retry=False)

    def work(self, worker: str, handle: Callable[[Any], None]) -> int:
        """Handle each message to a worker, on this thread, which must be the main one, until
        SIGTERM or SIGINT. Returns the exit code."""

        @self._app.task(name=TASK, ignore_result=True)  # type: ignore[untyped-decorator]
        def message(content: Any) -> None:
            handle(content)

        logging.getLogger("celery").setLevel(logging.WARNING)
        logging.getLogger("celery.worker").addFilter(_in_one_line)
        while True:
            celery_worker = self._app.Worker(
                queues=[queue_of(worker)],
                pool="solo",
                concurrency=1,
                hostname=f"mflux@{worker}",
                loglevel=logging.getLogger().level,
                quiet=True,
                without_gossip=True,
                without_mingle=True,
                without_heartbeat=True,
            )
            with suppress(SystemExit):
                celery_worker.start()
            if state.should_terminate is not None or state.should_stop not in (None, RECONNECT):
                return int(celery_worker.exitcode or 0)
            state.should_stop = None
            time.sleep(RECONNECT_S)  # the broker has refused, for example because it is full

    def reconnect(self) -> None:
        """End the connection of work(), which makes a new one."""
        if state.should_stop is None:
            state.should_stop = RECONNECT

    # -- pictures ---------------------------------------------------------------------------------

    def put(self, content: bytes, key: str | None = None) -> str:
        """Give a picture to the broker, for BLOB_S; returns its key. Raises:
        CarrierUnavailable."""
        key = key or new_key()
        with _refusals():
            self._redis.set(PREFIX + "blob." + key, content, ex=BLOB_S)
        return key

    def get(self, key: str) -> bytes | None:
        """A picture; None: it is not there any more. Raises: CarrierUnavailable."""
        with _refusals():
            found: Any = self._redis.get(PREFIX + "blob." + key)
        return found if isinstance(found, bytes) else None

    def drop(self, *keys: str) -> None:
        """Remove pictures. Raises: CarrierUnavailable."""
        if keys:
            with _refusals():
                self._redis.delete(*(PREFIX + "blob." + key for key in keys))


class _Receiver(ConsumerMixin):  # type: ignore[misc]
    def __init__(self, connection: Any, handle: Callable[[Any], None]) -> None:
        self.connection = connection
        self._handle = handle

    def get_consumers(self, consumer: type[Consumer], channel: Any) -> list[Consumer]:
        queue = Queue(HEAD, Exchange(HEAD), HEAD)
        return [consumer([queue], callbacks=[self._received], accept=["json"], no_ack=True)]

    def _received(self, content: Any, message: Any) -> None:
        self._handle(content)

    def on_connection_error(self, exc: Exception, interval: float) -> None:
        pass  # the dispatcher notices and logs it

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        log.warning("a message to the head cannot be read: %s", exc)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Of what Celery could not do, without the traceback."""
    record.exc_info = None
    return True


def new_key() -> str:
    return secrets.token_hex(16)


def queue_of(worker: str) -> str:
    return f"{PREFIX}worker.{worker}"


def split_tls(url: str) -> tuple[str, dict[str, Any]]:
    """Returns the URL without its options, and those of TLS. Certificates are always checked."""
    parts = urlsplit(url)
    options = parse_qs(parts.query)
    bare = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    if parts.scheme != "rediss":
        return bare, {}
    tls: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if name in options:
            tls[name] = options[name][0]
    return bare, tls


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ERRORS as error:
        raise CarrierUnavailable(f"{type(error).__name__}: {error}") from error
