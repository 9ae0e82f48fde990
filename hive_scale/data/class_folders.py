"""Image folders with one subfolder per class, as in torchvision's ImageFolder: list the classes and their images."""

from __future__ import annotations

from pathlib import Path

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # file endings that count as images


def class_folders(root: Path) -> list[Path]:
    """Return the class folders of `root`, sorted. Hidden folders, which desktops and notebooks leave behind, are
    skipped.
    """
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return (images, other files) of a class at any depth. Hidden files, such as .DS_Store and ._1.jpg, are in
    neither.
    """
    found = sorted(folder.rglob("*"))
    seen = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    images = [path for path in seen if path.suffix.lower() in ENDINGS]
    return images, [path for path in seen if path.suffix.lower() not in ENDINGS and path.is_file()]
