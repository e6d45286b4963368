"""`wanlora plan` and `--dry_run`, as typed."""

import json

from tests.runs import TrainingFolder
from wanlora.cli.main import main
from wanlora.cli.train_network import main as train


def plan(folder: TrainingFolder, *flags: str) -> tuple[int, str]:
    folder.capture.readouterr()
    code = main(["plan", *folder.arguments("style"), *flags])
    return code, folder.capture.readouterr().err


def test_a_plan_needs_neither_caches_nor_a_card(training_folder: TrainingFolder) -> None:
    for path in training_folder.folder.rglob("*_wan*.safetensors"):
        path.unlink()
    path = training_folder.folder / "plan.json"
    code, text = plan(training_folder, "--card", "RTX 4090", "--blocks_to_swap", "auto", "--json", str(path))
    assert code == 0, text
    assert "plan for RTX 4090, 23.6 GiB of which 21.6 can be used:" in text and "it fits" in text
    assert "--blocks_to_swap auto: 0; " in text
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["fits"] and record["disk_bytes"]["latents_there"] == 0
    assert not training_folder.output.exists()


def test_a_card_may_be_given_by_its_memory(training_folder: TrainingFolder) -> None:
    code, text = plan(training_folder, "--vram", "0.7")
    assert code == 0, text
    assert "plan for a card, 0.7 GiB of which 0.0 can be used:" in text and "it does not fit" in text
    assert "about" not in text.split("an epoch:")[1].splitlines()[0]


def test_without_a_card_the_processor_is_planned_for(training_folder: TrainingFolder) -> None:
    code, text = plan(training_folder)
    assert code == 0, text
    assert "are free" in text.split("system memory:")[1].splitlines()[0]
    assert "plan for the processor" in text and '--card "RTX 4090" or --vram 24' in text


def test_everything_that_is_wrong_is_listed_at_once(training_folder: TrainingFolder) -> None:
    code, text = plan(training_folder, "--card", "RTX 4090", "--no_such", "--lr_scheduler", "x")
    assert code == 2
    assert all(part in text for part in ("2 problems", "--no_such", "--lr_scheduler"))
    code, text = plan(training_folder, "--vram", "24", "--optimizer_type", "Adamm", "--dit", "missing.safetensors")
    assert code == 2
    assert all(part in text for part in ("2 problems", "Adamm", "missing.safetensors"))
    code, text = plan(training_folder, "--card", "RTX 409")
    assert code == 2 and "did you mean 'rtx 4090'" in text
    code, text = plan(training_folder, "--card", "RTX 4090", "--vram", "24")
    assert code == 2 and "give one of them" in text


def test_help_lists_the_trainers_flags_and_its_own(training_folder: TrainingFolder) -> None:
    training_folder.capture.readouterr()
    try:
        main(["plan", "--help"])
    except SystemExit as ended:
        assert ended.code == 0
    text = training_folder.capture.readouterr().out
    assert text.startswith("usage: wanlora plan") and "--card" in text and "--blocks_to_swap" in text


def test_a_dry_run_shows_the_plan(training_folder: TrainingFolder) -> None:
    text = training_folder.train(training_folder.arguments("style", "--dry_run", "--blocks_to_swap", "auto"))
    assert "plan for the processor" in text and "an epoch: 8 steps" in text
    assert "--blocks_to_swap auto: 0, because" in text
    assert not training_folder.output.exists()


def test_auto_trains_and_resumes_without_a_remark(training_folder: TrainingFolder) -> None:
    flags = ("--blocks_to_swap", "auto", "--save_state", "--save_every_n_steps", "1")
    training_folder.train(training_folder.arguments("style", *flags, "--max_train_steps", "1"))
    arguments = training_folder.arguments("style", *flags, "--max_train_steps", "2", "--resume", "latest")
    assert "differs" not in training_folder.train(arguments)
    assert train([*arguments, "--blocks_to_swap", "auto2"]) == 2
