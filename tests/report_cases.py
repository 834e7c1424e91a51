"""Reports as `intaglio.bench.assemble` makes them, with small pictures, for tests of what is made from a report."""

from __future__ import annotations

import copy

STAGES = {"tokenize": 0.001, "text_encoder": 0.01, "denoiser": 0.4, "scheduler": 0.003, "vae_decoder": 0.05}
PROMPTS = ("red heart", "红心")
VRAM, GPU = ("framework_bytes", "process_bytes", "device_delta_bytes"), "no NVIDIA GPU"
MACHINE = {
    "cpu": {
        "model": "Processor",
        "architecture": "x86_64",
        "flags": ["avx2"],
        "virtual": True,
        "cores": 2,
        "cores_of_machine": 4,
        "quota_cores": None,
    },
    "memory_gib": 24,
    "system": "Linux 6.1",
    "python": "3.11.7",
    "packages": {"intaglio": "0.1.0", "numpy": "2.4.6"},
    "gpus": [],
    "gpus_reason": "no NVIDIA GPU",
    "git_commit": "0123abcd",
}


def spread(median, n=6):
    low, high = median * 0.9, median * 1.1
    return {
        "median": median,
        "min": low,
        "max": high,
        "n": n,
        "mad": 0.0,
        "iqr": 0.0,
        "percentiles": {},
        "interval": [median * 0.95, median * 1.05],
        "values": [median] * n,
        "steady": True,
    }


def figures(psnr, flip=0.01, latents=0.001):
    """Scores of a picture; a PSNR of None is that of an identical one."""
    reasons = {"ms_ssim": "needs 161x161 pixels or more, found 16x16"}
    found = {"identical": psnr is None, "psnr": psnr, "ms_ssim": None, "ssimulacra2": None, "reasons": reasons}
    same = {"ssim": 1.0, "flip": 0.0, "latents_relative_l2": 0.0}
    return found | (same if psnr is None else {"ssim": 0.99, "flip": flip, "latents_relative_l2": latents})


def picture(folder, name, shade, size=(16, 16)):
    from PIL import Image

    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, shade // 256 % 256, 90)).save(path)
    return f"images/{name}"


def case(folder, label, number, *, reference, psnr, seconds, speedup, thorough, axes=None, prompts=PROMPTS):
    """One measured case; `psnr` of its pictures, each prompt 1 dB worse."""
    name, _, backend = label.split(" ")[0].partition("/")
    shown = []
    for index, prompt in enumerate(prompts):
        image = picture(folder, f"{number}/{index}.png", 1000 * number + index)
        row = {"prompt": prompt, "seed": 0, "image": image, "sha256": "0" * 64, "size": [16, 16]}
        row |= figures(psnr if psnr is None else psnr - index, flip=0.01 * number + 0.001 * index)
        if label != reference:
            row["heat"] = picture(folder, f"{number}/{index}.flip.png", 7 * number + index)
        shown.append(row)
    worst = figures(psnr if psnr is None else min(p["psnr"] for p in shown), flip=max(p["flip"] for p in shown))
    drift = [0.0] * 4 if label == reference else [1e-4 * number * (step + 1) for step in range(4)]
    calls = [("text_encoder", 0), ("unet", 0), ("unet", 3), ("vae_decoder", 4)]
    series = [[0.02 * i, 4_000_000 * i, 1_000_000 * i] for i in range(50)]
    memory = {"peak_bytes": 260_000_000, "reason": "", "series": series, "marks": {"loaded": 0.5, "pictured": 0.98}}
    memory |= {"resident_bytes": 2 * 10**8, "anonymous_bytes": 10**8, "file_bytes": 10**8, "children": 0}
    memory |= {"before_load_bytes": 30_000_000, "peak_private_bytes": 196_000_000, "peak_file_bytes": 49_000_000}
    return {
        "label": label,
        "artifact": name,
        "manifest_digest": f"digest-of-{name}",
        "backend": backend,
        "precision": "fp32",
        "labels": [],
        "settings": {},
        "device": "cpu",
        "threads": 1,
        **dict.fromkeys(("size", "steps", "scheduler", "guidance_scale")),
        "batch": 1,
        **(axes or {}),
        "artifact_bytes": 40_000_000 // number,
        "status": "ok",
        "error": "",
        "load_s": 1.5,
        "loads_s": [1.5],
        "compile_s": {"unet": 0.5, "vae_decoder": None},
        "first_image_s": 0.9,
        "warmup_s": [0.8],
        "image_s": spread(seconds),
        "step_s": spread(seconds / 4),
        "cpu_s": spread(seconds),
        "stage_s": {k: spread(v) for k, v in STAGES.items()},
        "stages_of_whole": 0.987,
        "energy": {"joules": None, "pictures_per_kwh": None, "source": None, "reason": "no counter"},
        "unsteady": False,
        "prompts": shown,
        "parameters": {"num_inference_steps": 4},
        "repeatable": True,
        "memory": memory if thorough else None,
        "vram": {**dict.fromkeys(VRAM), "reasons": dict.fromkeys(VRAM, GPU), "reason": GPU} if thorough else None,
        "engine_memory": {"unet": {"weight_bytes": 10_000_000}} if thorough else None,
        "components": [{"component": c, "step": s, "relative_l2": 1e-6 * number, "reason": ""} for c, s in calls]
        if thorough
        else None,
        "loop": {"inputs": 0.0, "where": "", "strayed": "", "pixels": 0} if thorough else None,
        "components_reason": "" if thorough else "not measured",
        "unquantized": name == "none",
        "speedup": spread(speedup),
        "speedup_of_fastest": speedup,
        "reference": reference,
        "worst": worst,
        "drift": drift,
        "fidelity_reason": "",
        "same_backend": None,
        "verdict": {"passed": True, "exceeded": []},
    }


def not_run(label):
    name, _, backend = label.partition("/")
    return {
        "label": label,
        "artifact": name,
        "manifest_digest": f"digest-of-{name}",
        "backend": backend,
        "precision": "int8",
        "artifact_bytes": 2000,
        "status": "not run",
        "error": "built, not run: no NVIDIA GPU",
    }


def artifact(name):
    digest = f"digest-of-{name}"
    return {"name": name, "family": "sd", "manifest_digest": digest, "licence": None, "recipe": {"unet": name}}


def report(cases, groups, *, axes, grid=(), prompts=PROMPTS):
    return {
        "schema_version": 2,
        "command": "intaglio bench none int8 --threads 1",
        "created": "2026-01-02T03:04:05Z",
        "machine": copy.deepcopy(MACHINE),
        "load_average": {"start": 0.1, "end": 0.4},
        "available_bytes_while_measuring": 2**34,
        "sittings": 1,
        "seconds": 213.0,
        "parent_cpu_s": 0.99,
        "reference": {"label": cases[0]["label"], "backend": cases[0]["backend"], "why": "the first case"},
        "settings": {
            "prompts": list(prompts),
            "seed": 0,
            "interleaving_seed": 0,
            **dict.fromkeys(("size", "steps", "scheduler")),
            "rounds": 6,
            "warmup": 1,
            "threads": 1,
            "isolation": "shared",
        },
        "limits": {},
        "learned": {},
        "artifacts": {c["artifact"]: artifact(c["artifact"]) for c in cases},
        "axes": axes,
        "grid": list(grid),
        "orders": [],
        "groups": groups,
        "cases": cases,
    }


def group(labels, reference, floors=(), **picture_axes):
    """A group of cases; `floors` are PSNRs of the reference against itself, by what was changed."""
    shown = {"size": "own", "batch": "1", "steps": "own", "scheduler": "own", "guidance_scale": "own"}
    return {
        "picture": shown | picture_axes,
        "labels": labels,
        "reference": reference,
        "why": "the first case",
        "noise_floor": [
            {"what": what, "worst": figures(psnr, 1e-5, 3e-7), "drift": [1e-8, 2e-8, 3e-8, 4e-8], "reason": ""}
            for what, psnr in floors
        ],
    }


def thorough(folder, prompts=PROMPTS):
    """Two artifacts on three backends, and plans that were not run."""
    first = "none/torch"
    rows = (
        (first, None, 0.8, 1.0),
        ("none/onnxruntime", 87.3, 0.4, 2.0),
        ("none/openvino", None, 0.5, 1.6),
        ("int8/torch", 48.0, 0.8, 1.0),
        ("int8/onnxruntime", 47.9, 0.5, 1.6),
        ("int8/openvino", 47.8, 0.45, 1.78),
    )
    cases = [
        case(folder, label, n, reference=first, psnr=p, seconds=s, speedup=x, thorough=True, prompts=prompts)
        for n, (label, p, s, x) in enumerate(rows, 1)
    ]
    floors = (("threads 2", 95.0), ("float64", 92.0))
    groups = [group([c["label"] for c in cases], first, floors)]
    axes = {"artifact": ["none", "int8"], "backend": ["torch", "onnxruntime", "openvino"]}
    return report([*cases, not_run("int8/tensorrt sm89")], groups, axes=axes, prompts=prompts)


def quick(folder, steps=(4, 8, 20), schedulers=("euler", "unipc", "dpmpp_2m")):
    """A swept matrix with a grid of three axes, without memory and components."""
    cases, groups = [], []
    for step in steps:
        for scheduler in schedulers:
            labels = [f"{a}/onnxruntime steps={step} scheduler={scheduler}" for a in ("none", "int4")]
            for label, psnr, speed in zip(labels, (None, 33.0 + step / 10), (1.0, 0.84), strict=True):
                more = {"axes": {"steps": step, "scheduler": scheduler}, "thorough": False, "seconds": 0.02 * step}
                number = len(cases) + 1
                cases.append(case(folder, label, number, reference=labels[0], psnr=psnr, speedup=speed, **more))
            groups.append(group(labels, labels[0], steps=str(step), scheduler=scheduler))
    axes = {"artifact": ["none", "int4"], "steps": [str(s) for s in steps], "scheduler": list(schedulers)}
    return report(cases, groups, axes=axes, grid=("steps", "scheduler", "artifact"))
