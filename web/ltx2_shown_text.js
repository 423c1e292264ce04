import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

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
