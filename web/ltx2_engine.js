import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

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

// The text that a node shows (`ui.text`) stands below it, read-only and not saved in the workflow.
const SHOWN = "shown";

function show(node, text) {
  let widget = node.widgets?.find((other) => other.name === SHOWN);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, SHOWN, ["STRING", { multiline: true }], app).widget;
    widget.serialize = false;
    widget.options.serialize = false;
    const input = widget.inputEl ?? widget.element;
    if (input) input.readOnly = true;
  }
  widget.value = text;
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "ltx2_engine.shown_text",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "LTX2EnhancePrompt") return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message, ...rest) {
      executed?.call(this, message, ...rest);
      if (message?.text) show(this, [message.text].flat().join("\n"));
    };
  },
});
