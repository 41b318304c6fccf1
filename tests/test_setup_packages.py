"""How the scripts install Debian packages: what comes with them is not started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.house import ROOT

APT = """#!/bin/sh
echo "$@" >>"$TOLD/apt"
cat "$POLICY" >"$TOLD/policy" 2>/dev/null
"$POLICY"
echo $? >"$TOLD/said"
%s
"""
THEIRS = "#!/bin/sh\nexit 0\n"
LEFT_BEHIND = "#!/bin/sh\n# made by corral\nkill -0 %d 2>/dev/null && exit 101\nexit 0\n"
UNITS = "/lib/systemd/system/redis-server.service\n/lib/systemd/system/redis-server@.service\n/usr/bin/redis-server\n"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for folder in ("bin", "told"):
        (tmp_path / folder).mkdir()
    program(tmp_path, "apt-get", APT % "")
    program(tmp_path, "dpkg", f"#!/bin/sh\nprintf '{UNITS}'\n")
    program(tmp_path, "systemctl", '#!/bin/sh\necho "$@" >>"$TOLD/systemctl"\n')
    return tmp_path


def program(machine: Path, name: str, text: str) -> None:
    (machine / "bin" / name).write_text(text)
    (machine / "bin" / name).chmod(0o755)


def install(machine: Path) -> subprocess.CompletedProcess[str]:
    around = {
        "PATH": f"{machine / 'bin'}:{os.environ['PATH']}",
        "TOLD": str(machine / "told"),
        "POLICY": str(machine / "policy-rc.d"),
    }
    script = ". scripts/setup.sh; policy_rc_d=$POLICY; if apt_install redis-server; then echo fine; fi"
    command = ["bash", "-euc", script]
    return subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=8)


def told(machine: Path, name: str) -> str:
    return (machine / "told" / name).read_text()


def test_nothing_is_started_now_or_at_the_next_boot(machine: Path) -> None:
    done = install(machine)
    assert done.stdout == "fine\n", done.stderr
    assert told(machine, "said") == "101\n"
    assert told(machine, "apt") == "install -y -qq --no-install-recommends redis-server\n"
    assert told(machine, "systemctl") == "disable --quiet redis-server.service\n"
    assert not (machine / "policy-rc.d").exists()


def test_an_own_policy_has_the_say_and_stays(machine: Path) -> None:
    policy = machine / "policy-rc.d"
    policy.write_text(THEIRS)
    policy.chmod(0o755)
    assert install(machine).stdout == "fine\n"
    assert (told(machine, "policy"), told(machine, "said"), policy.read_text()) == (THEIRS, "0\n", THEIRS)


def test_a_policy_that_was_left_behind_allows_everything_and_is_renewed(machine: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    policy = machine / "policy-rc.d"
    policy.write_text(LEFT_BEHIND % gone.pid)
    policy.chmod(0o755)
    assert subprocess.run([policy]).returncode == 0
    assert install(machine).stdout == "fine\n"
    assert told(machine, "said") == "101\n"
    assert not policy.exists()


@pytest.mark.parametrize("end", ["exit 100", "kill -TERM $PPID; sleep 0.2"])
def test_it_goes_away_however_the_installation_ends(machine: Path, end: str) -> None:
    program(machine, "apt-get", APT % end)
    assert "fine" not in install(machine).stdout
    assert told(machine, "said") == "101\n"
    assert not (machine / "policy-rc.d").exists()
    assert not (machine / "told" / "systemctl").exists()


def test_where_none_can_be_made_the_packages_come_all_the_same(machine: Path) -> None:
    (machine / "policy-rc.d").mkdir()
    assert install(machine).stdout == "fine\n"
