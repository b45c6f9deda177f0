"""Kept state in files: the format is safetensors', nothing is copied whole, damage is found.

Background: kept state was turned into one bytes object, hashed and written, and read the same way: two to three copies of 5 GB a rank
(7B weights, half of them frozen, 8 ranks).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smartfrz_ds.backends.deepspeed.model_files import ModelStates, read_client_state
from smartfrz_ds.backends.state_layout import pack_state
from smartfrz_ds.checkpoint import tensor_file
from smartfrz_ds.checkpoint.files import digest_of
from smartfrz_ds.checkpoint.tensor_file import BUFFER_BYTES, file_digest, read_kept, read_tensors, write_tensors

ABOUT = {"kept": [{"param": "a.weight", "numbers": {"x": 0.1}}]}


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(str(dtype)))
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)


def some_tensors() -> dict[str, Tensor]:
    table = torch.arange(3.0)
    made = {f"0/{name}": drawn(dtype, 3, 5) for name, dtype in tensor_file._DTYPES.items() if dtype != torch.bool}
    return made | {
        "0/bool": torch.tensor([True, False, True]),
        "0/step": torch.tensor(3.0),
        "0/none": torch.zeros(0, 4),
        "1/state/exp_avg": torch.randn(4, 6, 2, 2).to(memory_format=torch.channels_last),
        "1/part": torch.randn(10)[3:7],
        "1/t1": table,
        "1/t2": table,
        "1/grad": torch.ones(2, requires_grad=True),
    }


def same(found: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return found.keys() == tensors.keys() and all(
        (found[n].dtype, found[n].shape, raw(found[n])) == (t.dtype, t.shape, raw(t)) for n, t in tensors.items()
    )


@pytest.mark.parametrize("buffer", [BUFFER_BYTES, 64])
def test_a_file_comes_back_and_is_safetensors(tmp_path: Path, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BUFFER_BYTES", buffer)
    tensors, path = some_tensors(), tmp_path / "new" / "smartfrz_kept_0.safetensors"
    digest = write_tensors(path, ABOUT, tensors)
    assert digest == digest_of(path.read_bytes()) == file_digest(path)
    about, found = read_tensors(path, digest)
    assert about == ABOUT and same(found, tensors)
    assert len({t.data_ptr() for t in found.values() if t.numel()}) == sum(t.numel() > 0 for t in tensors.values())
    with safetensors.safe_open(path, framework="pt") as theirs:
        assert json.loads(theirs.metadata()["smartfrz"]) == ABOUT
        assert same({name: theirs.get_tensor(name) for name in theirs.keys()}, tensors)  # noqa: SIM118 (it is no dict)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    tensors = {name: t.detach().clone().contiguous() for name, t in some_tensors().items()}
    data = safetensors.torch.save(tensors, {"smartfrz": json.dumps(ABOUT), "format": "1"})
    (tmp_path / "smartfrz_kept_3.safetensors").write_bytes(data)
    kept = read_kept(tmp_path, {"3": digest_of(data)}, 3)
    assert kept is not None and kept[0] == ABOUT and same(kept[1], tensors)
    assert read_kept(tmp_path, {"3": digest_of(data)}, 2) is None


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    digest = write_tensors(path, ABOUT, some_tensors())
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    flipped = {at: whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 7, 20, 8 + header // 2, 8 + header, len(whole) - 1)}
    for data in (b"", b"x", whole[:100], whole[:-1], whole + b"x", *flipped.values()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"kept is damaged: its digest"):
            read_tensors(path, digest)
    huge = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}, "__metadata__": {}}).encode()
    path.write_bytes(len(huge).to_bytes(8, "little") + huge)
    with pytest.raises(ValueError, match="is damaged"):  # before a tensor of 4 TB is made
        read_tensors(path, digest)
    later = safetensors.torch.save({}, {"smartfrz": "{}", "format": "2"})
    path.write_bytes(later)
    with pytest.raises(ValueError, match="has format 2, this version of smartfrz_ds reads up to 1"):
        read_tensors(path, digest_of(later))
    with pytest.raises(ValueError, match="is missing"):
        read_tensors(tmp_path / "none", digest)
    with pytest.raises(ValueError, match=r"x has dtype torch\.complex128; allowed: "):
        write_tensors(tmp_path / "other", {}, {"x": torch.zeros(1, dtype=torch.complex128)})


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    digest = write_tensors(path, ABOUT, {"a": torch.ones(3)})
    with pytest.raises(NotImplementedError):  # no data to copy out of a meta tensor: an error half-way
        write_tensors(path, ABOUT, {"a": torch.ones(9), "b": torch.zeros(9, device="meta")})
    assert read_tensors(path, digest)[1]["a"].tolist() == [1, 1, 1] and [p.name for p in tmp_path.iterdir()] == ["kept"]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.bytes = max(self.bytes, made.nbytes)
        return made


def test_nothing_larger_than_the_buffer_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 MiB of kept state, with a buffer of 64 KiB: neither a bytes object (tracemalloc) nor a tensor (the dispatcher)."""
    limit, size = 2**16, 2**20
    monkeypatch.setattr(tensor_file, "BUFFER_BYTES", limit)
    state = {"exp_avg": torch.randn(size // 4), "t": torch.randn(16, size // 64).t(), "last": torch.randn(4, 4, size // 64)[:, 0]}
    state |= {"one": torch.randn(1, 2, size // 8).transpose(1, 2), "half": torch.randn(size).bfloat16()}
    with Largest() as largest:
        packed = pack_state(state)
        assert packed is not None and largest.bytes == 0, "kept state was copied"
        digest = write_tensors(tmp_path / "kept", *packed)
        assert 0 < largest.bytes <= limit // 2  # of which two live at a time
        largest.bytes = 0
        _, found = read_tensors(tmp_path / "kept", digest)
        assert largest.bytes <= max(t.nbytes for t in state.values())
    tracemalloc.start()
    write_tensors(tmp_path / "kept", *packed)
    read_tensors(tmp_path / "kept", digest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit
    assert same(found, state)


MEASURE = """
import sys, torch
from pathlib import Path
from smartfrz_ds.checkpoint.tensor_file import read_tensors, write_tensors

def high_water(action):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew (proc(5))
    def now(key):
        return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)) / 1024
    before = now("VmRSS")
    made = action()
    return made, now("VmHWM") - before

path = Path(sys.argv[1])
kept = {f"{i}/exp_avg": torch.full((4 * 2**20,), float(i)) for i in range(10)}
kept["turned"] = torch.ones(2**12, 2**11).t()
write_tensors(path, {}, {"warm": torch.ones(3)})
digest, saved = high_water(lambda: write_tensors(path, {}, kept))
found, loaded = high_water(lambda: read_tensors(path, digest))
assert all(torch.equal(found[1][name], t) for name, t in kept.items())
print(saved, loaded)
"""


def test_host_memory_of_a_save_and_a_load(tmp_path: Path) -> None:
    """192 MiB of kept state: a save takes the buffer (16 MiB, of a tensor that isn't contiguous), a load nothing beyond the state.

    8 MiB are for Python and the allocator.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("measured by Linux's /proc")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "kept")], capture_output=True, text=True, check=True, timeout=120)
    saved, loaded = map(float, re.findall(r"[\d.]+", done.stdout))
    assert saved < 16 + 8, f"a save took {saved} MiB"
    assert loaded < 192 + 8, f"a load took {loaded} MiB"


def test_the_marker_is_read_from_one_file(tmp_path: Path) -> None:
    """Under ZeRO-3 each rank has a model file; of the others nothing is opened."""
    torch.save({"smartfrz_ds": {"tag": "a"}}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in (1, 2, 10):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").write_bytes(b"not opened")
    assert read_client_state(tmp_path)["smartfrz_ds"] == {"tag": "a"}


def test_a_frozen_weight_is_read_from_the_files_of_the_ranks_that_hold_it(tmp_path: Path) -> None:
    """A universal load under ZeRO-3. Background: every rank opened the files of all ranks, for its own part of each weight."""
    whole = torch.arange(22.0)
    cut = torch.cat([whole, torch.zeros(3)]).view(5, 5)  # five ranks, three elements of padding
    for rank, part in enumerate(cut):
        torch.save({"frozen_param_fragments": {"w": part.clone()}}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    for begin in range(22):
        for end in range(begin, 23):
            states = ModelStates(tmp_path)
            assert torch.equal(states.frozen_elements("w", begin, end), whole[begin:end])
    for rank in (1, 4):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").write_bytes(b"not opened")
    states = ModelStates(tmp_path)
    assert torch.equal(states.frozen_elements("w", 11, 18), whole[11:18]) and len(states) == 5
    with pytest.raises(ValueError, match=r"zero_pp_rank_1_mp_rank_00_model_states\.pt can't be read"):
        states.frozen_elements("w", 9, 18)
