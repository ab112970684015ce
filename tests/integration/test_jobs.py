"""Jobs on a real Ray whose dashboard asks for a token: sent, followed, refused."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.cli import main
from cluster.connection import Unreachable
from cluster.errors import BadInput
from cluster.jobs import Jobs, dashboard_url
from cluster.local import LocalRay

FOLLOW_TIMEOUT_S = 100


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEM_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # no ~/.ray/auth_token
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        with LocalRay.start(num_cpus=2, dashboard=True) as started:
            # Ray's client would follow these rather than the address it is given.
            patch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
            patch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265")
            yield started


def url_of(local: LocalRay) -> str:
    assert local.dashboard_url is not None
    return local.dashboard_url


def test_no_token_no_job(local: LocalRay) -> None:
    routes = [
        ("POST", "/api/jobs/"),
        ("GET", "/api/jobs/"),
        ("GET", "/api/version"),
        ("DELETE", "/api/jobs/x"),
    ]
    with httpx.Client(base_url=url_of(local), timeout=10, trust_env=False) as client:
        for method, path in routes:
            body = {"entrypoint": "touch /tmp/never"}
            assert client.request(method, path, json=body).status_code == 401
            wrong = {"Authorization": "Bearer wrong"}
            assert client.request(method, path, json=body, headers=wrong).status_code == 403


def test_the_wrong_token_is_said_to_be_wrong(local: LocalRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_STATE_DIR", "/nowhere")
    with pytest.raises(Unreachable) as refused:
        Jobs(url_of(local))
    assert "no token (HTTP 401)" in refused.value.got
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(Unreachable) as refused:
        Jobs(url_of(local))
    assert "a wrong token (HTTP 403)" in refused.value.got


def test_a_job_carries_the_recipe_and_the_package_and_gives_its_exit_code(
    local: LocalRay, tmp_path: Path
) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("X = 41 + 1\n")
    (package / "__pycache__").mkdir()
    (package / ".git").mkdir()
    jobs = Jobs(url_of(local))
    # In the place of the cluster's `tandem`: shows what it was given, then ends as a refused gate would.
    show = (
        "sh -c 'ls -A . mine; python -c \"import mine; print(mine.X)\"; cat recipe.yaml; echo $@; exit 3' -"
    )
    job = jobs.submit({"model": "m", "name": "it's"}, run="r-1", package=package, tandem=show)
    said: list[str] = []
    ended = jobs.follow(job.job_id, said.append)
    text = "".join(said)
    assert (ended.status, ended.exit_code) == ("FAILED", 3)
    assert ".:\nmine\nrecipe.yaml\n" in text
    assert "mine:\n__init__.py\n" in text
    assert "\n42\n" in text
    assert "\nname: it's\n" in text
    assert f"train recipe.yaml --json --run r-1 --address {local.address}" in text
    assert job.job_id.startswith("r-1-")


def test_submit_from_the_command_line(
    local: LocalRay, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = {"train": str(tmp_path / "t"), "eval": str(tmp_path / "e")}
    recipe.write_text(
        yaml.safe_dump({"model": "m", "task": "image-classification", "data": data, "store": str(tmp_path)})
    )
    command = ["submit", str(recipe), "--address", url_of(local), "--json"]
    # The data isn't there: the real `tandem train` runs on the cluster, and refuses.
    assert main([*command, "--run", "r-2", "--wait"]) == 2
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert (told["run"], told["status"], told["exit_code"]) == ("r-2", "FAILED", 2)
    assert "error:" in err
    assert local.record.token not in out + err


@pytest.mark.parametrize("address", ["http://192.0.2.1:8265", "https://ray.example.com", "10.1.2.3"])
def test_nobody_beyond_this_machine_is_asked_without_a_token(local: LocalRay, address: str) -> None:
    with pytest.raises(BadInput, match="only with a token"):
        Jobs(address)


@pytest.mark.parametrize(
    "address", ["ray://h:1", "http://u:secret@h", "http://", "http://h:x", "http://h?a=b"]
)
def test_an_address_that_is_no_dashboards(address: str) -> None:
    with pytest.raises(BadInput) as refused:
        dashboard_url(address)
    assert "secret" not in str(refused.value)


def test_addresses_are_completed() -> None:
    assert dashboard_url("head") == dashboard_url("http://head/") == "http://head:8265"
    assert dashboard_url("https://head/ray/") == "https://head/ray"


def test_bad_input_stops_the_job_so_that_nobody_tries_it_again(local: LocalRay, tmp_path: Path) -> None:
    """A job that FAILED would get a new cluster from KubeRay, as often as its retries allow."""
    tandem = Path(sys.executable).parent / "tandem"
    jobs = Jobs(url_of(local))
    job = jobs.run_command(f"{tandem} train missing.yaml --as-job", tmp_path, run="r-2", model="m")
    said: list[str] = []
    ended = jobs.follow(job.job_id, said.append)
    assert ended.status == "STOPPED", said
    assert "missing.yaml" in "".join(said)
