"""Layer decay: the learning rate of a parameter follows its depth, at every ZeRO stage and after a resume."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from harness import run_ranks
from small_student import SmallRun, loss_of, run_file, small_student
from torch import Tensor, nn
from toy import differing

from megacid.models.clip import StudentSpec, model_config
from megacid.models.freezing import frozen_parameters, part_of
from megacid.models.student import clip_on_meta
from megacid.training.schedule import learning_rate_scales, parameter_groups

DECAY = 0.5
EPS = 1e-4  # the rounding of a gradient that is zero, such as that of a bias of the keys, must not become an update


def scales(model: str) -> dict[str, float]:
    return learning_rate_scales(clip_on_meta(StudentSpec(model), model_config(model)), DECAY)


def test_embeddings_blocks_and_heads_have_the_scales_of_beit() -> None:
    got = scales("digits-student")  # 3 and 2 blocks
    for name, power in {
        "visual.conv1.weight": 4, "visual.class_embedding": 4, "visual.positional_embedding": 4,
        "visual.ln_pre.bias": 4, "visual.transformer.resblocks.0.attn.in_proj_weight": 3,
        "visual.transformer.resblocks.2.mlp.c_fc.bias": 1, "visual.ln_post.weight": 0, "visual.proj": 0,
        "token_embedding.weight": 3, "positional_embedding": 3, "transformer.resblocks.0.ln_1.weight": 2,
        "transformer.resblocks.1.ln_1.weight": 1, "ln_final.weight": 0, "text_projection": 0, "logit_scale": 0,
    }.items():  # fmt: skip
        assert got[name] == DECAY**power, name


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("RN50", {"visual.conv2.weight": 17, "visual.layer1.0.downsample.0.weight": 16, "visual.layer4.2.bn3.bias": 1,
                  "visual.attnpool.positional_embedding": 0, "visual.attnpool.c_proj.weight": 0}),
        ("ViT-B-16-SigLIP", {"visual.trunk.patch_embed.proj.weight": 13, "visual.trunk.pos_embed": 13,
                             "visual.trunk.blocks.0.norm1.weight": 12, "visual.trunk.blocks.11.mlp.fc1.weight": 1,
                             "visual.trunk.attn_pool.latent": 0, "text.token_embedding.weight": 13,
                             "text.positional_embedding": 13, "text.transformer.resblocks.11.ln_1.bias": 1,
                             "text.ln_final.weight": 0, "logit_bias": 0}),
        ("MobileCLIP-B", {"visual.trunk.patch_embed.backbone.0.conv.weight": 13, "visual.trunk.pos_embed": 13,
                          "visual.trunk.blocks.0.norm1.weight": 12, "visual.trunk.head.weight": 0}),
        ("convnext_base", {"visual.trunk.stem.0.weight": 5, "visual.trunk.stem.1.bias": 5,
                           "visual.trunk.stages.0.blocks.0.norm.weight": 4, "visual.trunk.head.norm.weight": 0}),
    ],
)  # fmt: skip
def test_other_towers_are_read_by_their_names(model: str, names: dict[str, int]) -> None:
    got = scales(model)
    assert {name: got[name] for name in names} == {name: DECAY**power for name, power in names.items()}


def test_the_projection_of_a_hugging_face_text_tower_is_no_block() -> None:
    """Names of roberta-ViT-B-32, whose tower needs another package."""
    layer = {"layer": nn.ModuleList([nn.Linear(1, 1)])}
    transformer = {"embeddings": nn.Embedding(1, 1), "encoder": nn.ModuleDict(layer)}
    text = {"transformer": nn.ModuleDict(transformer), "proj": nn.Sequential(nn.Linear(1, 1), nn.GELU())}
    got = learning_rate_scales(nn.ModuleDict({"text": nn.ModuleDict(text)}), DECAY)
    assert got["text.transformer.embeddings.weight"] == DECAY**2
    assert got["text.transformer.encoder.layer.0.weight"] == DECAY
    assert got["text.proj.0.weight"] == 1


@pytest.mark.slow
def test_every_architecture_has_embeddings_blocks_and_a_head() -> None:
    for model in open_clip.list_models():
        config = open_clip.get_model_config(model)
        if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"]:
            continue
        got = scales(model)
        for tower in ("image", "text"):
            own = {value for name, value in got.items() if part_of(name) == tower}
            layers = sorted(own)
            assert len(layers) >= 4 and max(layers) <= 1.0, (model, tower, layers)


def test_without_decay_the_groups_are_two_and_frozen_blocks_count_as_layers() -> None:
    student = small_student()
    assert len(parameter_groups(student, 0.1)) == 2
    before = learning_rate_scales(student, DECAY)
    student.freeze(frozen_parameters(student.clip, ["visual.transformer.resblocks.0.*"], ("image",)))
    assert learning_rate_scales(student, DECAY) == before
    ids = {id(p): before[name] for name, p in student.named_parameters()}
    groups = parameter_groups(student, 0.1, DECAY)
    assert all(ids[id(p)] == group["lr_scale"] for group in groups for p in group["params"])


def trained(file: Path, stages: list[int]) -> list[dict[str, Tensor]]:
    """The state after two steps and a third one, at each stage; the third also after a resume, with the same bits."""
    found = []
    for stage in stages:
        world = torch.distributed.get_world_size()
        settings = [f"zero_optimization.stage={stage}", f"train_batch_size={world}", f"optimizer.params.eps={EPS}"]
        run, resumed = (SmallRun(file, settings, layer_decay=DECAY) for _ in range(2))
        for _ in range(2):
            run.step()
        resumed.load(run.state(), run.updates)
        run.step()
        resumed.step()
        found.append(run.state())
        assert differing(found[-1], resumed.state()) == [], stage
    return found


def reference() -> dict[str, Tensor]:
    """Three updates of PyTorch's AdamW with one group for each parameter."""
    student = small_student()
    scale = learning_rate_scales(student, DECAY)
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.ndim >= 2 else 0.0, "lr": 1e-2 * scale[name]}
        for name, p in student.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, eps=EPS)
    for step in range(3):
        g = torch.Generator().manual_seed(100 * step)
        image, text = torch.randn(4, 3, 32, 32, generator=g), torch.randint(1, 64, (4, 16), generator=g)
        optimizer.zero_grad()
        loss_of(student(image, text)).backward()
        for p in student.parameters():
            assert isinstance(p, nn.Parameter) and p.grad is not None
            p.grad.mul_(0.5)
        optimizer.step()
    return {name: p.detach() for name, p in student.named_parameters()}


@pytest.mark.parametrize(("world", "stages"), [(1, [0, 2, 3]), pytest.param(2, [0, 1, 2, 3], marks=pytest.mark.slow)])
def test_each_parameter_moves_at_its_own_rate_at_every_stage_and_after_a_resume(
    tmp_path: Path, world: int, stages: list[int]
) -> None:
    found = run_ranks(trained, world, run_file(tmp_path), stages, timeout_s=120)[0]
    want = reference() if world == 1 else {name: found[0][f"param/{name}"] for name in reference()}
    start = dict(small_student().named_parameters())
    for stage, got in zip(stages, found):
        for name, value in want.items():
            moved = (value - start[name]).norm()
            assert moved > 0 and (got[f"param/{name}"] - value).norm() <= 1e-3 * moved, (stage, name)
