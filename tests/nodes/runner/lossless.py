"""A small text-to-video workflow whose files hold the very bits of a run: pictures as PNG, sound as FLAC."""


def lossless(prompt: dict) -> dict:
    """The workflow with its video saved as pictures and sound: an encoder of videos need not write the same twice."""
    (create,) = (node for node in prompt.values() if node["class_type"] == "CreateVideo")
    kept = {key: node for key, node in prompt.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}
    images, audio = create["inputs"]["images"], create["inputs"]["audio"]
    return kept | {
        "90": {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": "frame"}},
        "91": {"class_type": "SaveAudio", "inputs": {"audio": audio, "filename_prefix": "sound"}},
    }


def contents(folder) -> dict:
    """What lies below a folder, by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
