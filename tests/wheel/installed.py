"""Run by the python of an environment that has the wheel and nothing of this repository: everything works there."""

from __future__ import annotations

import json
import subprocess
import sys
from http.client import HTTPResponse
from pathlib import Path
from urllib.request import Request, urlopen

import torch

import vpt_kernels
from vpt_kernels import (
    append_visual_kv,
    append_visual_kv_,
    cached_attention,
    control_cross_attention,
    control_cross_attention_into,
    fold_patch_weight,
    fold_projector,
    pack_weight,
    packed_linear,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patch_embed_into,
    roi_patches,
    rotary_table,
)
from vpt_kernels.backends import EXTENSION_PROBLEM


def every_operator(backend: str) -> dict[str, torch.Tensor]:
    """One call of each form of each operator, on the same inputs for every backend."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8)
    embed = fold_patch_weight(torch.randn(32, 3, 2, 14, 14) / 34, (0.5,) * 3, (0.5,) * 3)
    plan = plan_regions([(70, 90)], [(0, 5, 6, 85, 66)], qwen2_vl_policy())
    tokens = torch.zeros(plan.rows + 1, 32)
    roi_patch_embed_into([image], plan, embed, tokens, 1, backend=backend)
    norm, linear = (torch.ones(32), torch.zeros(32)), (torch.randn(32, 32) / 6, torch.randn(32))
    projector = fold_projector("identity", condition_norm=norm, condition=linear)
    features, control, rows = torch.randn(5, 32), torch.randn(1, 32), torch.arange(5).flip(0)
    buffer = torch.zeros(5, 32)
    control_cross_attention_into(features, control, projector, buffer, rows, backend=backend)
    q, k, v = (torch.randn(3, heads, 16) for heads in (4, 2, 2))
    caches, positions = torch.zeros(4, 8, 2, 16), torch.randint(0, 40, (3, 3))
    rest = (rotary_table(40, 16), positions, torch.tensor([4, 0, 7]))
    rotated = append_visual_kv(q, k, v, *rest, *caches[:2], (2, 3, 3), backend=backend)
    append_visual_kv_(q, k, v, *rest, *caches[2:], (2, 3, 3), backend=backend)
    weight, product = pack_weight(torch.randn(20, 16), "bfloat16"), torch.zeros(3, 20)
    packed_linear(q[:, 0], weight, out=product, backend=backend)
    return {
        "roi_patches": roi_patches([image], plan, backend=backend),
        "roi_patch_embed": roi_patch_embed([image], plan, embed, backend=backend),
        "roi_patch_embed_into": tokens,
        "control_cross_attention": control_cross_attention(features, control, projector, backend=backend),
        "control_cross_attention_into": buffer,
        "append_visual_kv": torch.cat([rotated.flatten(), caches.flatten()]),
        "append_visual_kv_": q,
        "cached_attention": cached_attention(q, *caches[:2], backend=backend)[0],
        "packed_linear": packed_linear(q[:, 1], weight, activation="silu", backend=backend),
        "packed_linear_into": product,
    }


def shell(*command: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def page() -> str:
    """`vpt app` on a free port: its files are there, and it answers a question about an example rightly."""
    command = [str(Path(sys.executable).with_name("vpt")), "app", "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            address = said.split("http://")[1].split("/")[0]
            for path in ("", "static/page.css", "static/page.js", "static/icon.svg"):
                assert urlopen(f"http://{address}/{path}", timeout=60).status == 200
            secret = {"X-VPT-Session": json.load(post(f"http://{address}/api/session", {}))["session"]}
            picture = json.load(post(f"http://{address}/api/examples", {"seed": 3}, secret))
            asked = {"question": picture["scene"]["questions"][0]["text"], "picture": picture["id"]}
            last = json.loads(post(f"http://{address}/api/turns", asked, secret).readlines()[-1])
            assert last["turn"]["right"], last
        finally:
            server.terminate()
    return said


def post(address: str, body: dict[str, object], headers: dict[str, str] | None = None) -> HTTPResponse:
    return urlopen(Request(address, json.dumps(body).encode(), headers or {}, method="POST"), timeout=300)


def main() -> None:
    place = Path(vpt_kernels.__file__)
    assert "site-packages" in place.parts and Path(sys.prefix) in place.parents, place
    assert EXTENSION_PROBLEM is None, EXTENSION_PROBLEM
    ours, expected = every_operator("cpp"), every_operator("reference")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-4, atol=1e-5)
        assert tensor.float().abs().sum() > 0
        print(f"{name}: as the reference")
    listed = shell("vpt", "env")
    assert f"{vpt_kernels.__version__}\n" in listed and "loaded" in listed, listed
    # vpt-mini's weights come with the wheel; the other demo draws random ones.
    for options in ((), ("--preset", "tiny")):
        Path("demo.png").unlink(missing_ok=True)
        shell("vpt", "demo", *options, "--out", "demo.png")
        assert Path("demo.png").read_bytes().startswith(b"\x89PNG")
    print(page(), listed)
    print(f"vpt_kernels {vpt_kernels.__version__} of {place.parent}: complete")


if __name__ == "__main__":
    main()
