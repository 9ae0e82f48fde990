"""Images in a folder per class, as torchvision's ImageFolder has them: what is a class, and what is an image."""

from __future__ import annotations

from pathlib import Path

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # of files that are taken for images


def class_folders(root: Path) -> list[Path]:
    """A folder's folders, each for a class; hidden ones, which desktops and notebooks leave behind, are none."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(images, other files) of a class, at any depth; hidden files, such as .DS_Store and ._1.jpg, are neither."""
    found = sorted(folder.rglob("*"))
    seen = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    images = [path for path in seen if path.suffix.lower() in ENDINGS]
    return images, [path for path in seen if path.suffix.lower() not in ENDINGS and path.is_file()]
