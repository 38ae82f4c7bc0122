"""The config tree: every shipped file loads; every kind of mistake is one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest

from torl_mega.config_file import config_hash, load_config
from torl_mega.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
QUICKSTART = CONF / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert load_config(path).num_steps > 0


def test_base_is_the_papers_recipe():
    config = load_config(CONF / "base.yaml")
    rollout, algo = config.rollout, config.algo
    assert (rollout.prompts_per_step, rollout.group_size, rollout.temperature) == (128, 16, 1.0)
    assert (config.data.max_prompt_tokens, rollout.max_response_tokens, rollout.max_tool_calls) == (400, 3072, 1)
    assert (config.trainer.mini_batch_samples, config.optim.lr) == (128 * 16, 1e-6)  # one update a step
    assert (algo.advantage, algo.kl_coef, algo.entropy_coef) == ("grpo", 0.0, 0.0)
    assert (config.reward.correct, config.reward.wrong, config.reward.code_error) == (1.0, -1.0, 0.0)
    assert (config.eval.temperature, config.eval.max_prompt_tokens) == (0.0, 1024)
    assert (config.sandbox.wall_s, config.sandbox.cpu_s) == (10.0, 10.0)


def test_the_papers_runs_evaluate_five_benchmarks_every_four_steps():
    for name, num_steps in (("torl_1.5b", 1000), ("torl_7b", 500)):
        config = load_config(CONF / f"{name}.yaml")
        assert [Path(p).stem for p in config.eval.data] == ["aime24", "aime25", "math500", "olympiadbench", "amc23"]
        assert (config.eval.every_steps, config.num_steps) == (4, num_steps)
        # servers have room for the longest evaluation prompt, micro-batches for the longest training sequence
        assert (config.max_context_tokens, config.max_train_tokens) == (1024 + 3072, 400 + 3072)


def test_the_recipe_page_says_what_the_configs_say():
    done = subprocess.run(
        [sys.executable, CONF.parent / "tools/make_recipe_doc.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("algo.clip_hgih=0.3", "algo.clip_hgih = 0.3 is not a setting; did you mean algo.clip_high?"),
        ("clip_high=0.3", "did you mean algo.clip_high?"),
        ("roolout.group_size=4", "did you mean rollout?"),
        ("optim.lr=fast", "optim.lr = 'fast': input should be a valid number"),
        ("optim.lr=.inf", "optim.lr = inf: input should be a finite number"),
        ("optim.betas=[0.9, 7]", "optim.betas.1 = 7: input should be less than 1"),
        ("rollout.group_size=0", "rollout.group_size = 0: input should be greater than 0"),
        ("serving.router=http://127.0.0.1:1", "serving.router needs serving.urls"),
        ("serving.urls=[localhost:30000]", "serving.urls.0 = 'localhost:30000': string should match"),
        ("serving.urls=[http://a:1/]", "serving.urls.0 = 'http://a:1/'"),  # its //ready is never there
        ("sandbox.address=localhost:8080", "sandbox.address = 'localhost:8080'"),
        ("data.overlong_prompts=skip", "input should be 'error' or 'drop'"),
        ("trainer.mini_batch_samples=100", "trainer.mini_batch_samples = 100 does not divide the 256 samples"),
        ("trainer.mini_batch_samples=512", "is more than a step collects"),
        ("trainer.micro_batch_tokens=64", "cannot hold one sequence"),
        ("reward.code_error=-2", "their sum must stay above -1.0"),
        ("parallel.sequence=true", "needs parallel.tensor > 1"),
        ("rollout.attempts_per_prompt=4", "is fewer than the rollout.group_size = 16"),
        ("algo.ref_every_steps=10", "it needs algo.kl_coef above 0"),
        ("algo.correction_geo=[1.1,0.9]", "algo.correction_geo = [1.1, 0.9] is not [low, high]"),
        ("algo.correction_low=3", "algo.correction_low = 3 is above algo.correction_high = 2"),
        ("algo.dual_clip=0.5", "algo.dual_clip = 0.5: input should be greater than 1"),
        ("eval.benchmarks.aime24.temprature=1", "eval.benchmarks.aime24.temprature"),
        ("name=../evil", "name = '../evil': a name has letters, digits"),
        ("learning_rate=1e-6", "learning_rate = 1e-06 is not a setting; did you mean optim.lr?"),
        ("rollout.num_generations=4", "did you mean rollout.group_size?"),
        ("optim.beta=0.9", "did you mean optim.betas?"),
        ("algo.beta=0.1", "did you mean algo.kl_coef?"),
        ("no_equals", "is not of the form section.key=value"),
        ("seed.x=1", "seed is a value, not a section"),
    ],
)
def test_wrong_settings_are_one_clear_line(override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_the_rightmost_wins_and_lists_replace():
    config = load_config(QUICKSTART, ["optim.lr=1e-5", "optim.lr=2e-5", "eval.data=[a.jsonl]", "rollout.replay=null"])
    assert config.optim.lr == 2e-5
    assert config.eval.data == ("a.jsonl",)
    assert config.rollout.replay is None


def test_base_chain_merges_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {CONF / 'base.yaml'}\nname: a\noptim: {{lr: 1e-4}}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\n")
    config = load_config(tmp_path / "b.yaml")
    assert (config.name, config.optim.lr, config.optim.clip_grad) == ("b", 1e-4, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: self.yaml\n", "goes round in a circle"),
        ("base: nowhere.yaml\n", r"self.yaml: base = 'nowhere.yaml': .* is no file; see conf/"),
        ("- a\n- b\n", "expected a mapping"),
        ("a: [1\n", "not readable as YAML"),
        ("name: x\nname: y\n", "stands twice"),
        ("name: x\n", r"num_steps, model, .* are missing; start from `base: base.yaml`"),
        (f"base: {CONF / 'base.yaml'}\nreward: {{function: 3}}\n", "reward.function"),
    ],
)
def test_broken_files(tmp_path, text, expected):
    path = tmp_path / "self.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_stale_samples_are_corrected_unless_the_config_says_otherwise():
    ahead = "rollout.max_staleness=1"
    assert load_config(QUICKSTART).algo.correction == "none"
    assert load_config(QUICKSTART, [ahead]).algo.correction == "tis"
    assert load_config(QUICKSTART, [ahead, "algo.correction=none"]).algo.correction == "none"


def test_hash_covers_the_recipe_and_not_the_name():
    one = config_hash(load_config(QUICKSTART))
    assert one == config_hash(load_config(QUICKSTART, ["name=other"]))
    assert one != config_hash(load_config(QUICKSTART, ["optim.lr=1e-5"]))


@pytest.mark.parametrize("value", ["off", "'off'", "rollout", "old"])
def test_router_replay_takes_each_of_its_words(value):
    """YAML reads a plain off as false."""
    assert load_config("conf/moe_30b_a3b.yaml", [f"algo.router_replay={value}"]).algo.router_replay == value.strip("'")


def test_routes_are_not_asked_for_through_a_router_that_drops_them():
    behind = ["algo.router_replay=rollout", "serving.urls=[http://a:1]", "serving.router=http://b:2"]
    with pytest.raises(ConfigError, match=r"router_replay = rollout cannot go through serving\.router"):
        load_config("conf/moe_30b_a3b.yaml", behind)


def test_routes_are_not_replayed_of_attempts_that_are_retracted_in_a_sync():
    ahead = ["algo.router_replay=rollout", "rollout.max_staleness=2"]
    with pytest.raises(ConfigError, match=r"rollout\.max_staleness > 1 needs rollout\.pause = in_place"):
        load_config("conf/moe_30b_a3b.yaml", ahead)
    assert load_config("conf/moe_30b_a3b.yaml", [*ahead, "rollout.pause=in_place"]).rollout.max_staleness == 2
