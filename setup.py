"""d2kd: knowledge distillation for object detectors, as an extension of Detectron2."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# The linters' newest versions ask for Python 3.11; older Pythons can still run everything else.
LINTERS = ["black==26.10.1", "flake8==7.5.0", "isort==9.0.2"]
PYTEST = ["pytest>=7"]
# Builds the site of docs/; its test is skipped without it.
DOCS = ["mkdocs-material>=9.5"]
# To prove an exported ONNX graph; without them it is not run.
ONNX = ["onnx", "onnxruntime"]
# Its backbones for detectors; their tests are skipped without it.
TIMM = ["timm>=1.0"]

setup(
    name="d2kd",
    description="Knowledge distillation for object detectors in Detectron2",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The configs travel inside the package, as Detectron2's do; with them the quickstart's teacher
    # and the figures of longer runs that it shows.
    packages=[*find_packages(include=["d2kd", "d2kd.*"]), "d2kd.configs"],
    package_dir={"d2kd.configs": "configs"},
    package_data={
        "d2kd.configs": [
            *("*/*.yaml", "*/*/*.yaml", "*/*/*.py"),
            *("quickstart/*.pth", "bench/*.csv"),
        ],
        "d2kd.report": ["page.html"],
    },
    # Outside the package, whose import takes seconds: `d2kd --help` must not.
    py_modules=["d2kd_cli"],
    entry_points={"console_scripts": ["d2kd = d2kd_cli:main"]},
    python_requires=">=3.9",
    # Detectron2 is not named here: PyPI has no package of that name, so pip would fail on it or,
    # once somebody registers it, install a stranger's code. third_party/detectron2 builds one.
    install_requires=[
        "fvcore>=0.1.5",
        "Jinja2",
        "numpy",
        "omegaconf>=2.1",
        "Pillow>=7.1",
        # These two fail on detections in a data set whose JSON has no "info".
        "pycocotools>=2.0.2,!=2.0.9,!=2.0.10",
        "PyYAML>=5.1",
        "tabulate",
        "torch>=2.0",
        "torchvision>=0.15",
    ],
    extras_require={
        "conformance": PYTEST,
        "dev": PYTEST
        + ["pytest-xdist>=3.8"]
        + DOCS
        + TIMM
        + [f"{package}; python_version >= '3.11'" for package in LINTERS + ONNX],
        "docs": DOCS,
        "onnx": ONNX,
        # Detectron2 draws with cv2, which opencv-python provides as well. The two overwrite each
        # other's files, so ask for this one only where `import cv2` fails; it needs no libGL.
        "opencv": ["opencv-python-headless"],
        "timm": TIMM,
    },
)
