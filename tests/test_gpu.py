import dataclasses

import pytest

from fedge_sim.config import Runtime, load_settings
from fedge_sim.runtime.gpu import PROFILES, batch_of, describe, resolve, set_for_nothing

# The table of profiles, row by row: conservative, high, aggressive.
REFERENCE = {
    "gpu_fraction": (0.5, 0.9, 0.95),
    "batch_size": (32, 64, 128),
    "accumulation": (1, 1, 2),
    "memory_share": (0.5, 0.95, 0.95),
    "memory_cleanup": ("round", "end", "never"),
    "caching": (False, True, True),
    "memory_pool": (False, True, True),
    "streams": (1, 1, 4),
    "pipelining": (False, True, True),
    "keep_warm": (False, False, True),
}


def test_the_three_profiles():
    assert list(PROFILES) == ["conservative", "high", "aggressive"]
    for profile, *values in zip(PROFILES.values(), *REFERENCE.values(), strict=True):
        assert dataclasses.asdict(profile) == dict(zip(REFERENCE, values, strict=True))


@pytest.mark.parametrize("name", PROFILES)
def test_with_a_gpu_a_profile_is_as_it_is(name):
    assert resolve(Runtime(gpu_profile=name), 1) == PROFILES[name]


SINGLE = {
    "memory_share": 0.25,
    "memory_cleanup": "end",
    "caching": True,
    "memory_pool": True,
    "streams": 3,
    "pipelining": True,
    "keep_warm": True,
}


@pytest.mark.parametrize(("key", "value"), SINGLE.items())
def test_a_single_setting_overrides_the_profile(key, value):
    profile = resolve(Runtime(**{key: value}), 2)
    assert profile == dataclasses.replace(PROFILES["conservative"], **{key: value})


def test_the_fraction_is_overridden_by_the_actors_setting():
    profile = resolve(Runtime(gpu_profile="high", num_gpus_per_actor=0.25), 1)
    assert profile == dataclasses.replace(PROFILES["high"], gpu_fraction=0.25)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("fixed", "gpus"), [("auto", 0), (0.25, 0), (0, 4)])
def test_without_a_gpu_what_only_a_gpu_has_is_off(name, fixed, gpus):
    wishes = {"gpu_profile": name, "streams": 4, "caching": True, "pipelining": True}
    profile = resolve(Runtime(**wishes, num_gpus_per_actor=fixed), gpus)
    assert (profile.gpu_fraction, profile.streams) == (0, 1)
    assert [profile.caching, profile.memory_pool, profile.pipelining] == [False] * 3
    assert profile.memory_share == min(0.8, PROFILES[name].memory_share)
    assert profile.keep_warm
    same = ("batch_size", "accumulation", "memory_cleanup")
    assert all(getattr(profile, key) == getattr(PROFILES[name], key) for key in same)


def test_a_memory_share_of_the_user_holds_on_a_cpu_too():
    assert resolve(Runtime(memory_share=0.9), 0).memory_share == 0.9


@pytest.mark.parametrize(
    ("assignments", "batch"),
    [
        ([], (32, 1)),
        (["runtime.gpu_profile=aggressive"], (32, 1)),
        (["runtime.gpu_profile=aggressive", "hierarchy.batch_size=profile"], (128, 1)),
        (["runtime.gpu_profile=aggressive", "hierarchy.accumulation=profile"], (32, 2)),
        (["hierarchy.batch_size=48", "hierarchy.accumulation=3"], (48, 3)),
    ],
)
def test_batches_are_the_profiles_only_if_the_settings_say_so(assignments, batch):
    assert batch_of(load_settings(assignments=assignments)) == batch


def test_description():
    runtime = Runtime(gpu_profile="aggressive")
    assert describe(resolve(runtime, 1), "aggressive", 1) == (
        "gpu_profile aggressive: gpu_fraction 0.95, memory_share 0.95, memory_cleanup never, "
        "caching on, memory_pool on, streams 4, pipelining on, keep_warm on, "
        "batch_size (if left to the profile) 128, accumulation (if left to the profile) 2"
    )
    line = describe(resolve(runtime, 0), "aggressive", 0)
    assert line.startswith("gpu_profile aggressive, no GPU here: CPU settings: gpu_fraction 0, ")
    unused = resolve(Runtime(num_gpus_per_actor=0), 2)
    assert describe(unused, "conservative", 2).startswith(
        "gpu_profile conservative, GPUs left unused: CPU settings: gpu_fraction 0, "
    )


def test_what_only_a_gpu_has_is_told_where_there_is_none():
    def told(gpus, *assignments):
        return set_for_nothing(load_settings(assignments=assignments).runtime, gpus)

    own = ("runtime.streams=2", "runtime.memory_pool=true", "runtime.caching=false")
    assert told(0) == []
    assert told(0, *own) == ["runtime.memory_pool", "runtime.streams"]
    assert told(1, *own) == []
    assert told(1, *own, "runtime.num_gpus_per_actor=0") == [
        "runtime.memory_pool",
        "runtime.streams",
    ]
