"""The stored forms of a secret, and that a gateway without slow ones never imports passlib."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.stores.keys import hashes

SECRET = "my-own-secret-0123456789"
# Made by passlib with the packages installed.
FOREIGN = {
    "pbkdf2_sha256": "$pbkdf2-sha256$1000$h1DqXasVolRKKQWAUEqJ0Q$1tTzJjWyabH0n67fhvzpv.nvGYmL.ZtNmkM2EKcQYM4",
    "pbkdf2_sha512": "$pbkdf2-sha512$1000$Oyek9B5D6J1zDkHoHYOw1g$"
    "VTrddICX1AUpJij7ZJzho33eHegdesSE9VHq3FAnPCORNvVzAxLb18IZSZWp4GP6EEZBaA9a6fyvPNb9Ls5UGQ",
    "pbkdf2_sha1": "$pbkdf2$1000$DWHsvfd.D0GIMSaEkJJyzg$iKHvqeYa83BJxTFtZukZGe3x1HY",
    "scrypt": "$scrypt$ln=4,r=8,p=1$tJbynpPyPuccw/jfu5eScg$57064RcMgWAy64x0GBZVxoWKb5TLmif6JG0s3EmYyE4",
    "bcrypt": "$2b$04$0s2n30oKGSnFDlFgGA4KyeN/.0/qV1ykjXN8RliLawoY95yPB49aa",
    "bcrypt_sha256": "$bcrypt-sha256$v=2,t=2b,r=4$5icC5ovbLUPI/HCONVWNRu$sp2RUcmEls9TH2Sp99KBFSpGbyHUeD6",
    "argon2": "$argon2id$v=19$m=64,t=1,p=1$9l5r7Z1zzpmzVqr1Xqs1Rg$P+WP39ZkBmUodX3ve4liIuZvCTg9+f9pDaRFf5SvhJU",
}
PACKAGES = {"bcrypt": "bcrypt", "bcrypt_sha256": "bcrypt", "argon2": "argon2"}


def test_generated_and_chosen() -> None:
    fast, slow = hashes.fast_hash(SECRET), hashes.slow_hash(SECRET)
    assert slow.startswith("$pbkdf2-sha256$600000$")
    for stored in (SECRET, fast, slow):
        assert hashes.problem(stored) is None
        assert hashes.matches(stored, SECRET)
        assert not hashes.matches(stored, SECRET + "x")
        assert not hashes.matches(stored, "\udcff")
    assert [hashes.form(stored) for stored in (SECRET, fast, slow)] == ["plaintext", "sha256", "pbkdf2_sha256"]


@pytest.mark.parametrize("scheme", list(FOREIGN))
def test_hashes_made_elsewhere(scheme: str) -> None:
    stored = FOREIGN[scheme]
    package = PACKAGES.get(scheme)
    if package and not importlib.util.find_spec(package):
        assert "needs a package that is not installed: pip install" in (hashes.problem(stored) or "")
        assert not hashes.matches(stored, SECRET)
        return
    assert hashes.problem(stored) is None
    assert hashes.form(stored) == scheme
    assert hashes.matches(stored, SECRET)
    for wrong in (SECRET + "x", "", "a\0b", "\udcff", "é" * 100):
        assert not hashes.matches(stored, wrong)
    for broken in (stored[:12], stored.rpartition("$")[0], stored + "!"):
        assert hashes.problem(broken) is not None
        assert not hashes.matches(broken, SECRET)


def test_passlib_is_not_imported_where_no_key_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"alice:{SECRET}\nbob:{hashes.fast_hash(SECRET + 'b')}\n")
    script = (
        "import sys, pathlib; from gateway.stores.keys.ring import KeyRing; "
        "ring = KeyRing(pathlib.Path(sys.argv[1])); assert ring.report.loaded == 2; "
        "sys.exit('passlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, path]).returncode == 0
