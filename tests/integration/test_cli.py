"""score-serve's own arguments, up to the point where the engine would start."""

from __future__ import annotations

import argparse
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from score_vllm import RetentionPolicy, catalog, plugin
from score_vllm.architectures import REFUSED
from score_vllm.server import arguments, cli, doctor, options


@pytest.fixture(scope="module")
def parser() -> Any:
    return arguments.build_parser()


@pytest.fixture(autouse=True)
def _demo_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("SCORE_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def configure(parser: Any, *argv: str) -> tuple[argparse.Namespace, str | None]:
    args = parser.parse_args(list(argv))
    return args, options.configure(args)


def test_demo(parser: Any) -> None:
    args, warning = configure(parser, "--model", "demo", "--retention", "0.25")
    serving = args.hf_overrides["score"]
    assert warning is None
    assert (serving["retention_ratio"], serving["method"]) == (0.25, "score")
    assert len(serving["policy_digest"]) == 64
    assert Path(serving["policy"]).is_dir()
    assert args.served_model_name == ["demo"]
    assert args.media_io_kwargs["video"]["video_backend"] == "score_pyav"
    assert args.media_io_kwargs["video"]["num_frames"] == 128


def test_videos_are_charged_by_what_is_encoded_unless_the_operator_says_otherwise(parser: Any) -> None:
    args, _ = configure(parser, "--model", "demo")
    assert args.ec_manager_config.encoder_cache_manager_cls == plugin.ENCODER_CACHE_MANAGER
    assert args.ec_manager_config.get_encoder_cache_manager_obj().__name__ == "EncodedTokensCacheManager"
    own = json.dumps({"encoder_cache_manager_cls": "vllm.v1.core.encoder_cache_manager.EncoderCacheManager"})
    args, _ = configure(parser, "--model", "demo", "--ec-manager-config", own)
    assert args.ec_manager_config.get_encoder_cache_manager_obj().__name__ == "EncoderCacheManager"


def test_json_logs_are_vllms_too_unless_the_operator_says_otherwise(parser: Any) -> None:
    assert getattr(configure(parser, "--model", "demo")[0], "logging_config", None) is None
    assert configure(parser, "--model", "demo", "--log-format", "json")[0].logging_config.formatter == "json"
    own = ["--logging-config.formatter", "text"]
    assert configure(parser, "--model", "demo", "--log-format", "json", *own)[0].logging_config.formatter == "text"


def test_defaults_are_the_documented_ones(parser: Any) -> None:
    args, _ = configure(parser, "--model", "demo")
    assert args.hf_overrides["score"]["retention_ratio"] == 0.1


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "72B"])
def test_short_names(size: str) -> None:
    model = catalog.resolve_model(f"Qwen2.5-VL-{size}")
    assert model.path == f"Qwen/Qwen2.5-VL-{size}-Instruct"
    assert model.served_names == [f"Qwen2.5-VL-{size}", model.path]
    with pytest.raises(catalog.UsageError, match="did you mean"):
        catalog.resolve_model(f"qwen2.5-vl-{size}")


def test_frames_loader_and_operators_own_media_options(parser: Any) -> None:
    media = json.dumps({"video": {"max_pixels": 10_000_000}, "image": {"image_mode": "RGB"}})
    args, _ = configure(
        parser,
        "--model",
        "demo",
        "--max-frames",
        "64",
        "--fps",
        "1",
        "--video-loader",
        "decord",
        "--media-io-kwargs",
        media,
    )
    video = args.media_io_kwargs["video"]
    assert (video["video_backend"], video["num_frames"], video["fps"]) == ("score_decord", 64, 1.0)
    assert video["max_pixels"] == 10_000_000
    assert args.media_io_kwargs["image"] == {"image_mode": "RGB"}
    args, _ = configure(parser, "--model", "demo", "--video-loader", "vllm", "--max-frames", "16")
    assert args.media_io_kwargs["video"] == {"num_frames": 16, "max_frames": 16}, "vLLM's Qwen loader heeds the second"
    assert args.hf_overrides["score"]["max_frames"] == 16
    assert args.limit_mm_per_prompt["video"] == 8
    args, _ = configure(parser, "--model", "demo", "--limit-mm-per-prompt", '{"video": 2, "image": 3}')
    assert args.limit_mm_per_prompt == {"video": 2, "image": 3}


def test_the_cell_cache_has_a_size(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args, _ = configure(parser, "--model", "demo")
    assert args.hf_overrides["score"]["cell_cache_gib"] is None, "the worker knows the device"
    args, _ = configure(parser, "--model", "demo", "--cell-cache-gib", "0.5")
    assert args.hf_overrides["score"]["cell_cache_gib"] == 0.5
    for bad in ("-1", "all", "nan", "1e9"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--model", "demo", f"--cell-cache-gib={bad}"])
        assert f"must be a number in [0, 4096], got '{bad}'" in capsys.readouterr().err


def test_bodies_have_a_largest_size(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert parser.parse_args(["--model", "demo"]).max_body_mib == 512
    assert parser.parse_args(["--model", "demo", "--max-body-mib", "8"]).max_body_mib == 8
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "demo", "--max-body-mib", "0"])
    assert "must be an integer >= 1, got '0'" in capsys.readouterr().err


def test_memory_is_reserved_for_the_frames_that_are_read(parser: Any) -> None:
    args, _ = configure(parser, "--model", "demo")
    assert (args.hf_overrides["score"]["max_frames"], args.hf_overrides["score"]["max_pixels"]) == (128, None)
    media = json.dumps({"video": {"num_frames": 300}})
    args, _ = configure(parser, "--model", "demo", "--media-io-kwargs", media, "--max-pixels", "40000")
    assert (args.hf_overrides["score"]["max_frames"], args.hf_overrides["score"]["max_pixels"]) == (300, 40000)
    args, _ = configure(parser, "--model", "demo", "--video-loader", "vllm")
    assert args.media_io_kwargs["video"]["max_frames"] == args.hf_overrides["score"]["max_frames"] == 128
    for bad in (0, -1, 2.5, "all"):
        media = json.dumps({"video": {"num_frames": bad}})
        message = refused(parser, "--model", "demo", "--media-io-kwargs", media)
        assert "video.num_frames must be an integer >= 1" in message
        assert repr(bad) in message


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"deadlin": 60}, r"media_io_kwargs.video has unknown keys \['deadlin'\]; known are"),
        ({"deadline": "soon"}, "deadline must be a number > 0, got 'soon'"),
        ({"fps": 5000}, r"video.fps must be a number in \[0, 240\], got 5000"),
        ({"fps": "fast"}, r"video.fps must be a number in \[0, 240\], got 'fast'"),
    ],
)
def test_media_options_that_every_video_would_be_refused_for(video: dict[str, Any], message: str, parser: Any) -> None:
    media = json.dumps({"video": video})
    assert re.search(f"^--media-io-kwargs: {message}", refused(parser, "--model", "demo", "--media-io-kwargs", media))
    configure(parser, "--model", "demo", "--media-io-kwargs", media, "--video-loader", "vllm")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--port", "99999"), "--port must be an integer in [0, 65535], got 99999"),
        (("--port", "-1"), "--port must be an integer in [0, 65535], got -1"),
        (("--host", "nowhere.invalid"), "--host 'nowhere.invalid' is no address of this machine"),
        (("--host", "203.0.113.7"), "--host '203.0.113.7' is no address of this machine"),
    ],
)
def test_where_no_server_can_listen(argv: tuple[str, str], message: str, parser: Any) -> None:
    assert refused(parser, "--model", "demo", *argv).startswith(message)
    args = parser.parse_args(["--model", "demo", *argv])
    (finding,) = doctor.check_port(args.host, args.port)
    assert finding.state == "error"
    assert finding.remedy == f"choose another {argv[0]}"


@pytest.mark.parametrize(
    "engine", [("--mm-encoder-tp-mode", "data"), ("--compilation-config", '{"compile_mm_encoder": true}')]
)
@pytest.mark.parametrize("chosen", [("--method", "fastvid"), ("--allow-methods", "evs,flashvid")])
def test_methods_that_rank_by_attention_need_to_see_it(
    engine: tuple[str, str], chosen: tuple[str, str], parser: Any
) -> None:
    configure(parser, "--model", "demo", *engine)
    message = refused(parser, "--model", "demo", *engine, *chosen)
    assert message.startswith("--method, --allow-methods: methods that rank by attention do not support")


def test_a_model_without_policy_warns_and_names_the_trainer(parser: Any, tiny_model: Path) -> None:
    args, warning = configure(parser, "--model", str(tiny_model))
    assert args.hf_overrides["score"]["method"] == options.TRAINING_FREE_METHOD
    assert warning is not None
    assert "python -m score_vllm.train" in warning
    assert args.served_model_name == [str(tiny_model)]


def test_other_overrides_survive(parser: Any, tiny_model: Path, tiny_policy: Path) -> None:
    args, _ = configure(
        parser, "--model", str(tiny_model), "--policy", str(tiny_policy), "--hf-overrides", '{"rope_theta": 5.0}'
    )
    assert args.hf_overrides["rope_theta"] == 5.0
    assert args.hf_overrides["score"]["policy"] == str(tiny_policy.resolve())


def refused(parser: Any, *argv: str) -> str:
    with pytest.raises(catalog.UsageError) as caught:
        configure(parser, *argv)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


def test_score_without_policy(parser: Any, tiny_model: Path) -> None:
    assert "needs --policy" in refused(parser, "--model", str(tiny_model), "--method", "score")


def test_policy_with_another_method(parser: Any, tiny_model: Path, tiny_policy: Path) -> None:
    message = refused(parser, "--model", str(tiny_model), "--method", "uniform", "--policy", str(tiny_policy))
    assert "drop one of them" in message


def test_policy_of_another_hidden_size_names_both(parser: Any, tiny_model: Path, tmp_path: Path) -> None:
    RetentionPolicy(96).save_pretrained(tmp_path / "other")
    message = refused(parser, "--model", str(tiny_model), "--policy", str(tmp_path / "other"))
    assert "hidden size 96" in message
    assert "hidden size 128" in message


def test_broken_policies(parser: Any, tiny_model: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(parser, "--model", str(tiny_model), "--policy", str(tmp_path / "none"))
    half = RetentionPolicy(128).save_pretrained(tmp_path / "half")
    (half / "policy.safetensors").unlink()
    assert "half-written" in refused(parser, "--model", str(tiny_model), "--policy", str(half))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--pipeline-parallel-size", "2"), "--tensor-parallel-size"),
        (("--video-pruning-rate", "0.5"), "use --retention"),
        (("--worker-extension-cls", "a.B"), "--worker-extension-cls"),
        (("--enable-dbo",), "--enable-dbo"),
        (("--enable-tower-connector-lora",), "--enable-tower-connector-lora"),
        (("--speculative-config", '{"method": "eagle", "model": "a/b", "num_speculative_tokens": 2}'), "'eagle'"),
    ],
)
def test_options_that_cannot_be_combined(parser: Any, argv: tuple[str, ...], message: str) -> None:
    assert message in refused(parser, "--model", "demo", *argv)


def test_unreadable_and_unsupported_models(parser: Any, tmp_path: Path) -> None:
    assert "cannot read the configuration" in refused(parser, "--model", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    message = refused(parser, "--model", str(tmp_path))
    assert "GPT2LMHeadModel" in message
    assert "Qwen2_5_VLForConditionalGeneration" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--retention", "0"), "(0, 1]"),
        (("--retention", "1.5"), "(0, 1]"),
        (("--retention", "nan"), "(0, 1]"),
        (("--retention", "ten percent"), "(0, 1]"),
        (("--max-frames", "0"), ">= 1"),
        (("--max-frames", "2.5"), ">= 1"),
        (("--fps", "-1"), "(0, 240]"),
        (("--fps", "inf"), "(0, 240]"),
        (("--method", "magic"), "invalid choice"),
        (("--video-loader", "vlc"), "invalid choice"),
    ],
)
def test_bad_values(parser: Any, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "demo", *argv])
    assert message in capsys.readouterr().err


def test_mistakes_in_our_options_need_no_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    """One line of usage and one of error, in the second before vLLM is imported."""
    for argv, message in {
        (): "--model is required",
        ("--retention", "2", "--model", "demo"): "(0, 1]",
        ("--model", "demo", "--fps", "0"): "(0, 240]",
    }.items():
        with pytest.raises(SystemExit) as caught:
            arguments.check_early(list(argv))
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 2
    for argv in (["--model", "demo"], ["owner/name"], ["--config", "file.yaml"], ["--model=demo", "--port", "1"]):
        arguments.check_early(argv)
    with pytest.raises(SystemExit) as caught:
        arguments.check_early(["--help"])
    assert caught.value.code == 0
    assert "--retention RATIO" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        arguments.check_early(["--help=all"])
    assert caught.value.code == 0, "help ends here: the server's own start forks this process"
    assert "--max-num-seqs" in capsys.readouterr().out


def test_a_mistyped_option_is_recognised(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "demo", "--retension", "0.1"])
    error = capsys.readouterr().err
    assert "did you mean '--retention'?" in error
    assert len(error.splitlines()) == 2


def test_a_taken_port_is_said_before_loading(parser: Any) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        assert f"--port {port} cannot be used" in refused(
            parser, "--model", "demo", "--host", "127.0.0.1", "--port", port
        )


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "/no/where", "a/b/c"])
def test_names_that_cannot_be_hub_ids_are_not_asked_for(name: str) -> None:
    with pytest.raises(catalog.UsageError, match="is no directory, no hub id"):
        catalog.resolve_model(name)


@pytest.mark.parametrize(
    ("host", "shown"),
    [(None, "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]"), ("h", "h")],
)
def test_the_banner_names_an_address_to_connect_to(host: str | None, shown: str) -> None:
    names = {"served_model_name": ["m"], "retention": 0.1, "score_clip": None, "ssl_certfile": None}
    for playground in (True, False):
        text = cli.banner(argparse.Namespace(host=host, port=80, playground=playground, **names))
        assert f"http://{shown}:80/v1" in text
        assert (f"http://{shown}:80/playground" in text) == playground


@pytest.mark.parametrize(
    ("argv", "on"),
    [
        ((), False),
        (("--host", "127.0.0.1"), True),
        (("--host", "localhost"), True),
        (("--host", "0.0.0.0"), False),
        (("--host", "127.0.0.1", "--no-playground"), False),
        (("--host", "0.0.0.0", "--playground"), True),
    ],
)
def test_the_playground_is_on_for_this_machine_alone(argv: tuple[str, ...], on: bool, parser: Any) -> None:
    args, _ = configure(parser, "--model", "demo", *argv)
    assert args.playground is on


def test_setting_the_allow_list_keeps_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    options.check_plugins()
    names = set(options.os.environ["VLLM_PLUGINS"].split(","))
    assert "score" in names
    for group in options.DEFAULT_ON_GROUPS:
        assert {point.name for point in options.entry_points(group=group)} <= names
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    options.check_plugins()
    assert options.os.environ["VLLM_PLUGINS"] == "other,score"


def test_a_missing_entry_point_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "entry_points", lambda **_: [])
    with pytest.raises(catalog.UsageError, match="is missing"):
        options.check_plugins()


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes the directory ``tmp_path`` a model of the architecture that it is called with."""

    def make(name: str) -> str:
        text = SimpleNamespace(hidden_size=3584)
        config = SimpleNamespace(architectures=[name], get_text_config=lambda: text)
        monkeypatch.setattr("vllm.transformers_utils.config.get_config", lambda *_, **__: config)
        return str(tmp_path)

    return make


def test_sampling_is_the_familys(parser: Any, architecture: Any) -> None:
    args, _ = configure(parser, "--model", architecture("LlavaOnevisionForConditionalGeneration"))
    video = args.media_io_kwargs["video"]
    assert (video["num_frames"], video["fps"]) == (64, 0), "evenly over the video"
    args, _ = configure(parser, "--model", architecture("Qwen3VLForConditionalGeneration"))
    assert (args.media_io_kwargs["video"]["num_frames"], args.media_io_kwargs["video"]["fps"]) == (128, 2.0)


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_be_exact_are_refused_with_the_reason(
    name: str, parser: Any, architecture: Any
) -> None:
    with pytest.raises(catalog.UsageError, match="which is not supported: ") as refused:
        configure(parser, "--model", architecture(name))
    assert REFUSED[name] in str(refused.value)


def test_a_checkpoint_that_brings_its_own_code_is_refused_with_the_reason(parser: Any, tmp_path: Path) -> None:
    """Transformers cannot read its configuration."""
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat"}
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(catalog.UsageError, match=r"is a InternVLChatModel, which is not supported: .*-HF"):
        configure(parser, "--model", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Unheard"], "model_type": "unheard"}))
    with pytest.raises(catalog.UsageError, match="cannot read the configuration"):
        configure(parser, "--model", str(tmp_path))


def test_a_policy_of_another_architecture_is_refused(parser: Any, architecture: Any, tmp_path: Path) -> None:
    RetentionPolicy(3584, policy_width=64).save_pretrained(tmp_path / "p")
    model = architecture("LlavaOnevisionForConditionalGeneration")
    with pytest.raises(catalog.UsageError, match="was made for Qwen2_5_VL"):
        configure(parser, "--model", model, "--policy", str(tmp_path / "p"))


def test_short_names_of_every_family() -> None:
    assert catalog.resolve_model("Qwen3-VL-30B-A3B").path == "Qwen/Qwen3-VL-30B-A3B-Instruct"
    assert catalog.resolve_model("Qwen3.5-9B").path == "Qwen/Qwen3.5-9B"
    assert catalog.resolve_model("GLM-4.1V-9B").path == "zai-org/GLM-4.1V-9B-Thinking"
    assert catalog.resolve_model("InternVL3.5-8B").path == "OpenGVLab/InternVL3_5-8B-HF"
    with pytest.raises(catalog.UsageError, match="convert_llava_video"):
        catalog.resolve_model("LLaVA-Video-7B")


def test_engines_under_ray_get_our_variable_and_ray_its_folder() -> None:
    environment = {"VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "MINE"}
    cli.prepare_for_ray(environment)
    assert environment["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == f"MINE,{cli.STATS_VARIABLE}"
    assert environment["RAY_TMPDIR"] == cli.tempfile.gettempdir()
    given = {"RAY_TMPDIR": "/scratch"}
    cli.prepare_for_ray(given)
    assert given == {"RAY_TMPDIR": "/scratch", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": cli.STATS_VARIABLE}
