"""What a bundle's decoder does on onnxruntime's CUDA, as JSON on stdout; run by the tests.

probe.py BUNDLE    with FAKE_CUDA_LOG, PYTHONPATH and LD_LIBRARY_PATH of fake_cuda.prepare()
"""

import json
import logging
import os
import sys
from pathlib import Path

import numpy as np

from gap_runtime.backends import open_backend
from gap_runtime.bundle.bundle import Bundle

PROMPT = 20


def main():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    bundle = Bundle.open(Path(sys.argv[1]))
    stage = bundle.manifest.stages[-1]
    backend, device = open_backend("onnxruntime:cuda")
    decoder = backend.open_decoder(bundle, stage, device)
    specs = {spec.name: spec for spec in stage.inputs}
    width, axes = int(specs["embeddings"].shape[-1]), int(specs["position_ids"].shape[0])
    log = Path(os.environ["FAKE_CUDA_LOG"])

    def call(rows, slot):
        """The lines that the fake wrote while the decoder ran some rows."""
        before = log.stat().st_size
        wanted = np.arange(max(rows - 8, 0), rows) if rows <= 8 else np.array([rows - 1])
        positions = np.broadcast_to(np.arange(slot, slot + rows), (axes, rows))
        decoder.run(np.ones((1, rows, width), np.float32), positions, slot, wanted)
        with log.open() as file:
            file.seek(before)
            return file.read().splitlines()

    found = {"opened": log.read_text().splitlines(), "prefill": call(PROMPT, 0)}
    slot, many = PROMPT, decoder.fit(8)
    for name, rows in (("step", 1), ("draft", many), ("again", decoder.fit(5))):
        for part in ("first", "second", "third"):
            found[f"{part} {name}"] = call(rows, slot)
            slot += rows
    session = decoder._session
    nodes = [
        (str(part.ep_name), str(node.op_type))
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    found |= {
        "decoder": type(decoder).__name__,
        "said": said,
        "elsewhere": sorted({op for name, op in nodes if name != "CUDAExecutionProvider"}),
        "nodes": len(nodes),
        "on_host": [each.name for each, place in places if place.name in ("Cpu", "CpuPinned")],
        "sizes": {
            "embeddings": width * 4,
            "logits": int(stage.outputs[0].shape[-1]) * 4,
            "cache": stage.inputs[-1].count_bytes(),
        },
    }
    if hasattr(decoder, "copy_slots"):
        saved = decoder.copy_slots(5)
        decoder.put_slots(saved)
        found["saved"] = saved.size
    json.dump(found, sys.stdout)


main()
