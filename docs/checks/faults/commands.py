"""Faults of calibration and of the command lines."""

from __future__ import annotations

from faults.fault import Fault

CALIBRATION = [
    Fault(
        "split-like-whole",
        "a policy for a draft that each device holds whole is taken for one that is split",
        "s2d_jax/generation/policy.py",
        "if mesh_of(draft.params) == mesh and is_split(draft.params):",
        "if False:",
        "calibration/test_calibration_on_a_mesh.py -k whole_or_of_a_split",
    ),
    Fault(
        "policy-of-any-machine",
        "a policy is found on other machines than it was measured on",
        "s2d_jax/generation/policy.py",
        'fields = ("target", "draft", "formats", "device", "temperature_class")',
        'fields = ("target", "draft", "formats", "temperature_class")',
        "calibration/test_calibration.py -k policies_are_kept",
    ),
    Fault(
        "fingerprint-of-shapes",
        "models of one shape have one fingerprint",
        "s2d_jax/weights/fingerprint.py",
        "digest.update(name.encode() + values.tobytes())",
        "digest.update(name.encode())",
        "calibration/test_calibration.py -k fingerprints",
    ),
    Fault(
        "replay-drafts-one-more",
        "a replayed chain may be as long as what is left to emit",
        "s2d_jax/calibration/replay.py",
        "most = min(limit, total - at - 1)",
        "most = min(limit, total - at)",
        "calibration/test_calibration.py -k by_hand",
    ),
]

COMMANDS = [
    Fault(
        "brackets-are-markup",
        "what is shown is read as markup",
        "s2d_jax/cli/screen.py",
        "super().__init__(markup=False, emoji=False,",
        "super().__init__(markup=True, emoji=False,",
        "cli/test_plain_screen.py -k shown_as_they_are",
    ),
    Fault(
        "outputs-not-tried",
        "outputs are not tried before work begins",
        "s2d_jax/cli/outputs.py",
        '        with contextlib.suppress(FileExistsError), probe.open("xb") as file:',
        '        with contextlib.suppress(FileExistsError, OSError), probe.open("xb") as file:',
        "cli/test_outputs.py -k told_in_a_line",
    ),
    Fault(
        "unicode-ends-rows",
        "line ends of Unicode inside JSON texts end a row",
        "s2d_jax/files.py",
        'enumerate(text.split("\\n"), start=1)',
        "enumerate(text.splitlines(), start=1)",
        "text/test_messages.py -k only_a_line_feed",
    ),
    Fault(
        "tools-trained-on",
        "what a tool said is trained on as an answer",
        "s2d_jax/text/messages.py",
        '"model", "bot", "ai"',
        '"model", "bot", "tool"',
        "text/test_messages.py -k left_out_by_reason",
    ),
    Fault(
        "mistakes-with-status-1",
        "a user's mistake ends a command with status 1",
        "s2d_jax/cli/command.py",
        'return 2, f"error: ',
        'return 1, f"error: ',
        "infer/test_infer_generate.py -k as_a_process",
    ),
    Fault(
        "other-settings-believed",
        "a killed run goes on under other settings",
        "infer/generate/journal.py",
        "if before != now:",
        "if (before is None) != (now is None):",
        "infer/test_regenerate.py -k other_settings",
    ),
    Fault(
        "answered-twice-written-twice",
        "a batch that two workers answered stands in the journal twice",
        "infer/generate/engine.py",
        "if done.number in entries:",
        "if False:",
        "infer/test_ray_batches.py -k through_a_journal --all",
    ),
    Fault(
        "cut-off-called-finished",
        "answers that were cut off are called finished",
        "infer/generate/answering.py",
        "[not set(stop_ids).isdisjoint(answer.token_ids[-1:]) for answer in answers]",
        "[True for _ in answers]",
        "infer/test_infer_generate.py -k cut_off",
    ),
    Fault(
        "coins-turned",
        "coins of a simulated acceptance accept what they should reject",
        "infer/accelerator_check/coins.py",
        "coin_BG < request.acceptance_B[:, None]",
        "coin_BG >= request.acceptance_B[:, None]",
        "infer/test_accelerator_check.py -k coins",
    ),
    Fault(
        "every-process-writes",
        "each of several processes opens the journal, and not only the first",
        "infer/generate/engine.py",
        "later, writes=is_main_process())",
        "later, writes=True)",
        "infer/test_several_processes.py -k sampled",
    ),
    Fault(
        "other-prompts-unnoticed",
        "processes that were given other prompts decode them together",
        "infer/generate/answering.py",
        "    check_agreement(settings_of(args, questions))\n",
        "",
        "infer/test_several_processes.py -k other_prompts",
    ),
    Fault(
        "peers-loss-is-a-stack",
        "what fails because another process is gone is told with a traceback",
        "s2d_jax/cli/together.py",
        'or "Gloo" in str(error)',
        "",
        "infer/test_several_processes.py -k 'dies and second'",
    ),
]
