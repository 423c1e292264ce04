import { app } from "../../scripts/app.js";

// An input with `ltx2_fills` ({option: {widget name: value}}) is a preset: choosing an option sets these widgets.
// Loading a workflow sets values without calling callbacks, so it keeps the numbers saved in it.
const presetsOfClass = new Map();

function presetsOf({ input }) {
  const inputs = Object.entries({ ...input?.required, ...input?.optional });
  return inputs.map(([name, spec]) => [name, spec[1]?.ltx2_fills]).filter(([, fills]) => fills);
}

function fill(node, values) {
  for (const [name, value] of Object.entries(values ?? {})) {
    const widget = node.widgets.find((other) => other.name === name);
    if (widget) {
      widget.value = value;
      widget.callback?.(value, app.canvas, node);
    }
  }
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "ltx2_engine.presets",

  beforeRegisterNodeDef(_nodeType, nodeData) {
    const presets = presetsOf(nodeData);
    if (presets.length) presetsOfClass.set(nodeData.name, presets);
  },

  nodeCreated(node) {
    for (const [name, fills] of presetsOfClass.get(node.comfyClass) ?? []) {
      const widget = node.widgets?.find((other) => other.name === name);
      if (!widget) continue;
      const callback = widget.callback;
      widget.callback = function (value, ...rest) {
        const result = callback?.call(this, value, ...rest);
        fill(node, fills[value]);
        return result;
      };
    }
  },
});
