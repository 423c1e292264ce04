"""Run prompts on a ComfyUI server that is up, and answer what it said, one entry a prompt.

    python server_checks.py URL PROMPTS.json

PROMPTS.json is a list of {"prompt": API prompt, "interrupt": null | node id}: the latter posts /interrupt when that node
has reported its first step of 1000. Needs aiohttp, which ComfyUI requires.
"""

import asyncio
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp
from comfy_process import answer

ENDINGS = ("execution_success", "execution_error", "execution_interrupted")
STEPS = 1000


async def run(session: aiohttp.ClientSession, job: dict[str, Any]) -> dict[str, Any]:
    """Queue one prompt and follow it to its end."""
    client = uuid.uuid4().hex
    bars: dict[str, list[list[float]]] = {}
    interrupted_at = None
    async with session.ws_connect(f"/ws?clientId={client}") as socket:
        async with session.post("/prompt", json={"prompt": job["prompt"], "client_id": client}) as response:
            queued = await response.json()
        if response.status != 200 or queued["node_errors"]:
            return {"status": response.status, "queued": queued}
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = message.json()
            if event["type"] in ENDINGS and event["data"]["prompt_id"] == queued["prompt_id"]:
                break
            if event["type"] != "progress_state":
                continue
            for node, state in event["data"]["nodes"].items():
                bars.setdefault(node, []).append([state["value"], state["max"]])
                stepped = state["max"] == STEPS and state["value"] >= 1
                if interrupted_at is None and node == job["interrupt"] and stepped:
                    interrupted_at = time.monotonic()
                    await session.post("/interrupt", json={})
    ended = time.monotonic()
    history = await wait_for(session, queued["prompt_id"])
    return {
        "status": 200,
        "ended": event["type"],
        "history": history["status"]["status_str"],
        "messages": [name for name, _ in history["status"]["messages"]],
        "outputs": history["outputs"],
        "bars": bars,
        "stop_seconds": None if interrupted_at is None else ended - interrupted_at,
    }


async def wait_for(session: aiohttp.ClientSession, prompt_id: str) -> dict[str, Any]:
    """The history entry, which is written just after the last event."""
    for _ in range(100):
        async with session.get(f"/history/{prompt_id}") as response:
            found = await response.json()
        if prompt_id in found:
            return found[prompt_id]
        await asyncio.sleep(0.1)
    raise TimeoutError(f"prompt {prompt_id} is not in the history")


async def main() -> None:
    url, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(120)) as session:
        answer({"runs": [await run(session, job) for job in jobs]})


if __name__ == "__main__":
    asyncio.run(main())
