"""Which artifact decides: the file's, unless it is bad and a committed one is there?

A file replaced at the same path, or SIGHUP, brings a new policy while the worker runs; a bad file
leaves the old one in force.
"""

from __future__ import annotations

from rlv3.errors import PolicyError
from rlv3.policy import Policy
from worker.bus import Bus, BusError
from worker.config import WorkerConfig
from worker.errors import RedisUnavailable
from worker.logs import Log

LOOK_S = 1.0
"""How often the file is looked at."""


def load_policy(config: WorkerConfig) -> Policy:
    """Read the artifact and refuse one that must not be served.

    Raises:
        PolicyError: it cannot be used, was trained on another env, or has no training steps and
            `allow_untrained` is off.
    """
    policy = Policy.load(config.policy)
    policy.check_serving(allow_untrained=config.allow_untrained)
    return policy


async def policy_at_start(config: WorkerConfig, bus: Bus, log: Log) -> Policy:
    """Read the artifact; where it is bad, continue with the one that was committed.

    Raises:
        PolicyError: the file is bad and there is nothing to continue with.
    """
    try:
        return load_policy(config)
    except PolicyError as error:
        policy = await _committed(config, bus)
        if policy is None:
            raise
        log.error(
            "POLICY_REFUSED",
            msg=f"{error}; continues with the committed artifact",
            policy=policy.digest,
        )
        return policy


async def _committed(config: WorkerConfig, bus: Bus) -> Policy | None:
    """Return the policy of the last commit, from the bytes kept in Redis."""
    try:
        await bus.connect()
        source = await bus.committed_artifact()
        if source is None:
            return None
        policy = Policy(source, "the committed artifact")
        policy.check_serving(allow_untrained=config.allow_untrained)
    except (RedisUnavailable, BusError, PolicyError):
        return None  # the file's own error says what the operator has to mend
    return policy


class ArtifactWatch:
    """Notices another artifact at the path of the configuration.

    Attributes:
        policy: the one in force.
    """

    def __init__(self, config: WorkerConfig, policy: Policy) -> None:
        self._config = config
        self._seen: tuple[int, ...] | None = None
        self.policy = policy

    def changed(self) -> bool:
        """Return True when the file is not the one of the last call; costs one stat."""
        try:
            found = self._config.policy.stat()
            stamp: tuple[int, ...] = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            stamp = ()
        before, self._seen = self._seen, stamp
        return stamp != before

    def load(self) -> Policy | None:
        """Read the file as at start; None when it holds the artifact in force.

        Raises:
            PolicyError: it must not be served, or its steps have another length.
        """
        policy = load_policy(self._config)
        if policy.step_seconds != self.policy.step_seconds:
            raise PolicyError(
                f"{policy.origin}: expected steps of {self.policy.step_seconds} s like those of "
                f"the bars in hand, found {policy.step_seconds} s"
            )
        return None if policy.digest == self.policy.digest else policy
