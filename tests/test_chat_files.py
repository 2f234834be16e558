"""Which files belong together: beside a model, and in a repository of the Hub."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from kvcapsule_gguf.chat import files, hub
from kvcapsule_gguf.runtime.errors import KVCapsuleError

PRINT, OTHER = "a" * 64, "b" * 64


def write_gguf(path: Path, architecture: str = "llama", fingerprint: str | None = None) -> Path:
    """A GGUF without tensors; with a fingerprint it claims to hold a capsule."""
    w = gguf.GGUFWriter(path, architecture)
    if fingerprint is not None:
        w.add_uint32("kvcapsule.version", 1)
        w.add_string("kvcapsule.base.architecture", architecture)
        w.add_string("kvcapsule.base.fingerprint", fingerprint)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "Some-VL-7B-Q4_K_M.gguf")


def find(model: Path, setting: str = "auto", mmproj: Path | None = None, fingerprint: str = PRINT) -> Path | None:
    return files.find_capsule(setting, model, mmproj, "llama", fingerprint)


# --- projector -------------------------------------------------------------------------------------------------------------------------------


def test_the_only_mmproj_beside_the_model_is_taken(model: Path) -> None:
    assert files.find_mmproj(model, None) is None
    mmproj = write_gguf(model.with_name("mmproj-model-f16.gguf"), "clip")
    assert files.find_mmproj(model, None) == mmproj


def test_of_several_mmprojs_the_one_named_like_the_model_is_taken(model: Path) -> None:
    for name in ("mmproj-Another-VL-2B-F16.gguf", "mmproj-Some-VL-7B-F32.gguf", "mmproj-Some-VL-7B-F16.gguf"):
        write_gguf(model.with_name(name), "clip")
    assert files.find_mmproj(model, None).name == "mmproj-Some-VL-7B-F16.gguf"


@pytest.mark.parametrize("name", ["Some-VL-7B-Q4_K_M.mmproj-f16.gguf", "mmproj-Some-VL.GGUF", "MMPROJ.gguf"])
def test_other_names_of_a_projector(model: Path, name: str) -> None:
    mmproj = write_gguf(model.with_name(name), "clip")
    assert files.find_mmproj(model, None) == mmproj and files.model_in(model.parent) == model
    with pytest.raises(KVCapsuleError, match="is a projector"):
        files.check_model(mmproj)


def test_a_link_to_a_model_finds_what_is_beside_the_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mmproj, capsule = write_gguf(model.with_name("mmproj-x.gguf"), "clip"), write_gguf(model.with_name("kvcapsule-x.GGUF"), fingerprint=PRINT)
    link = tmp_path_factory.mktemp("elsewhere") / "current.gguf"
    link.symlink_to(model)
    assert (files.find_mmproj(link, None), find(link)) == (mmproj, capsule)
    near = write_gguf(link.with_name("mmproj-near.gguf"), "clip")
    assert files.find_mmproj(link, None) == near


def test_a_given_mmproj_must_exist(model: Path) -> None:
    with pytest.raises(KVCapsuleError, match="does not exist"):
        files.find_mmproj(model, model.with_name("no.gguf"))


@pytest.mark.parametrize("name, message", [("mmproj-x.gguf", "is a projector"), ("kvcapsule-x.gguf", "is a capsule"), ("text.gguf", "not a GGUF file"), ("no.gguf", "does not exist")])
def test_files_that_are_not_models(tmp_path: Path, name: str, message: str) -> None:
    if name == "text.gguf":
        (tmp_path / name).write_text("hello")
    elif name != "no.gguf":
        write_gguf(tmp_path / name)
    with pytest.raises(KVCapsuleError, match=message):
        files.check_model(tmp_path / name)


# --- capsule ---------------------------------------------------------------------------------------------------------------------------------


def test_off_and_a_given_file(model: Path) -> None:
    capsule = write_gguf(model.with_name("kvcapsule-Some-VL-7B.gguf"), fingerprint=PRINT)
    other = write_gguf(model.with_name("elsewhere.gguf"), fingerprint=OTHER)
    assert find(model, "off") is None
    assert find(model, str(other)) == other
    with pytest.raises(KVCapsuleError, match="the capsule .* does not exist"):
        find(model, str(capsule.with_name("no.gguf")))


def test_the_one_that_matches_by_fingerprint(model: Path) -> None:
    write_gguf(model.with_name("kvcapsule-Another.gguf"), fingerprint=OTHER)
    assert find(model) is None
    capsule = write_gguf(model.with_name("kvcapsule-Some-VL-7B.gguf"), fingerprint=PRINT)
    assert find(model) == capsule


def test_by_architecture_when_there_is_no_fingerprint(model: Path) -> None:
    write_gguf(model.with_name("kvcapsule-Another.gguf"), "qwen2vl", OTHER)
    capsule = write_gguf(model.with_name("kvcapsule-Some-VL-7B.gguf"), fingerprint="")
    assert find(model) == find(model, fingerprint="") == capsule


def test_the_mmproj_comes_first(model: Path) -> None:
    write_gguf(model.with_name("kvcapsule-Some-VL-7B.gguf"), fingerprint=PRINT)
    mmproj = write_gguf(model.with_name("mmproj-x.gguf"), fingerprint=PRINT)
    assert find(model, mmproj=mmproj) == mmproj
    mmproj = write_gguf(model.with_name("mmproj-x.gguf"), fingerprint=OTHER)
    assert find(model, mmproj=mmproj).name == "kvcapsule-Some-VL-7B.gguf"


def test_two_that_match_are_a_question_for_the_user(model: Path) -> None:
    for name in ("kvcapsule-a.gguf", "kvcapsule-b.gguf"):
        write_gguf(model.with_name(name), fingerprint=PRINT)
    with pytest.raises(KVCapsuleError, match="kvcapsule-a.gguf, kvcapsule-b.gguf.*--capsule"):
        find(model)


def test_a_damaged_file_is_not_passed_over_in_silence(model: Path) -> None:
    damaged = model.with_name("kvcapsule-Some-VL-7B.gguf")
    damaged.write_bytes(write_gguf(model.with_name("x.gguf"), fingerprint=PRINT).read_bytes()[:60])
    assert find(model) == damaged
    good = write_gguf(model.with_name("kvcapsule-good.gguf"), fingerprint=PRINT)
    assert find(model) == good


# --- hub -------------------------------------------------------------------------------------------------------------------------------------

REPO = ["README.md", "Some-VL-7B-Q4_K_M.gguf", "Some-VL-7B-Q8_0.gguf", "Some-VL-7B-IQ2_M.gguf", "mmproj-Some-VL-7B-f16.gguf", "mmproj-Some-VL-7B-f32.gguf",
        "kvcapsule-Some-VL-7B-F16.gguf", "kvcapsule-Some-VL-7B-Q8_0.gguf", "imatrix-Some-VL-7B.gguf", "mtp-Some-VL-7B-Q8_0.gguf"]  # fmt: skip


def test_model_mmproj_and_capsules_by_name() -> None:
    choice = hub.choose(REPO, "", "u/r")
    assert choice.model == ["Some-VL-7B-Q4_K_M.gguf"]
    assert choice.mmproj == "mmproj-Some-VL-7B-f16.gguf"
    assert choice.capsules == ["kvcapsule-Some-VL-7B-F16.gguf", "kvcapsule-Some-VL-7B-Q8_0.gguf"]


@pytest.mark.parametrize("quant, name", [("Q8_0", "Some-VL-7B-Q8_0.gguf"), ("q8_0", "Some-VL-7B-Q8_0.gguf"), ("IQ2_M", "Some-VL-7B-IQ2_M.gguf")])
def test_a_capsule_is_never_the_model(quant: str, name: str) -> None:
    assert hub.choose(REPO, quant, "u/r").model == [name]
    with pytest.raises(KVCapsuleError, match="no model with quantization F16"):
        hub.choose(REPO, "F16", "u/r:F16")
    with pytest.raises(KVCapsuleError, match="no GGUF model"):
        hub.choose([name for name in REPO if not name.startswith("Some")], "", "u/r")


def test_parts_of_a_split_model_come_together() -> None:
    names = [f"Q8_0/big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)] + ["mmproj-big-f16.gguf", "Q4_0/mmproj-big-f16.gguf"]
    choice = hub.choose(names, "", "u/r")
    assert choice.model == names[:3] and choice.mmproj == "mmproj-big-f16.gguf"
    with pytest.raises(KVCapsuleError, match="2 of 3 parts"):
        hub.choose(names[:2], "", "u/r")


def test_a_folder_is_a_repository(model: Path) -> None:
    mmproj = write_gguf(model.with_name("mmproj-Some-VL-7B-F16.gguf"), "clip")
    write_gguf(model.with_name("kvcapsule-Some-VL-7B.gguf"), fingerprint=PRINT)
    assert hub.fetch(str(model.parent)) == (model, mmproj)


@pytest.mark.parametrize("spec", ["justaname", "a/b/c", "a b/c", "../x/.."])
def test_malformed_repositories(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KVCapsuleError, match="expected user/repo"):
        hub.fetch(spec)


class FakeHub:
    """huggingface_hub on a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.folder, self.fetched, self.error, self.asked, self.cached = folder, [], None, 0, False
        for name in ("list_repo_files", "hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def list_repo_files(self, repo: str, token: str | None = None) -> list[str]:
        self.asked += 1
        if self.error:
            raise self.error
        return [path.name for path in self.folder.iterdir()]

    def hf_hub_download(self, repo: str, name: str) -> str:
        self.fetched.append(name)
        return str(self.folder / name)

    def snapshot_download(self, repo: str, local_files_only: bool) -> str:
        assert local_files_only
        if not self.cached:
            raise FileNotFoundError("nothing cached")
        return str(self.folder)


def test_fetching_brings_the_capsule_beside_the_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(model.parent, monkeypatch)
    mmproj = write_gguf(model.with_name("mmproj-Some-VL-7B-F16.gguf"), "clip")
    capsule = write_gguf(model.with_name("kvcapsule-Some-VL-7B.gguf"), fingerprint=PRINT)
    assert hub.fetch("user/repo:Q4_K_M") == (model, mmproj)
    assert fake.fetched == [model.name, mmproj.name, capsule.name]
    assert find(model, mmproj=mmproj) == capsule


def test_without_a_network_the_cached_files_are_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(model.parent, monkeypatch)
    fake.error, fake.cached = ConnectionError("offline"), True
    assert hub.fetch("user/repo") == (model, None)
    fake.cached = False
    with pytest.raises(KVCapsuleError, match="cannot be reached and nothing is cached .offline."):
        hub.fetch("user/repo")


def test_what_is_cached_is_used_before_anybody_is_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not without a projector, which an interrupted download may have left out, nor for another quantization."""
    fake = FakeHub(model.parent, monkeypatch)
    fake.cached = True
    assert hub.fetch("user/repo") == (model, None) and fake.asked == 1
    mmproj = write_gguf(model.with_name("mmproj-Some-VL-7B-F16.gguf"), "clip")
    assert hub.fetch("user/repo") == hub.fetch("user/repo:Q4_K_M") == (model, mmproj) and fake.asked == 1
    with pytest.raises(KVCapsuleError, match="no model with quantization Q8_0"):
        hub.fetch("user/repo:Q8_0")
    assert fake.asked == 2


def test_offline_nobody_is_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(model.parent, monkeypatch)
    with pytest.raises(KVCapsuleError, match="-hf user/repo: not in the local cache"):
        hub.fetch("user/repo", offline=True)
    fake.cached = True
    assert hub.fetch("user/repo", offline=True) == (model, None)
    assert hub.fetch(str(model.parent), offline=True) == (model, None), "a folder"
    assert fake.asked == 0
