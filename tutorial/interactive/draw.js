"use strict";
// What both figures share: SVG elements, labelled sliders, and drawing again when the width changes.

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function html(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A labelled range input; `change` is called with nothing after every move.
function slider(name, label, min, max, value, change) {
  const input = html("input", { type: "range", id: name, min, max, step: 1, value });
  const output = html("output", { for: name }, String(value));
  input.addEventListener("input", () => {
    output.textContent = input.value;
    change();
  });
  return { input, node: html("div", { class: "slider" }, html("label", { for: name }, label), input, output) };
}

// Two digits: 0.46, 1.2e-5.
function short(value) {
  return value >= 0.01 ? value.toPrecision(2) : value.toExponential(1).replace(".0", "");
}

// Build the figure named `name` from the JSON beside it; draw(width) is called now and at every new width.
function interactive(name, build) {
  for (const figure of document.querySelectorAll(`[data-interactive="${name}"]`)) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const stage = figure.querySelector(".stage");
    stage.replaceChildren();
    const draw = build(stage, data);
    let width = 0;
    const resized = () => {
      if (stage.clientWidth === width || !stage.clientWidth) return;
      width = stage.clientWidth;
      draw();
    };
    resized();
    new ResizeObserver(resized).observe(stage);
  }
}
