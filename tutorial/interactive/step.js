"use strict";
// Step through one update over K devices: every matrix as a heat map with its shape and rank.

interactive("step", (stage, data) => {
  const picture = html("div", { class: "picture devices" });
  const readout = html("p", { class: "readout", "aria-live": "polite" });
  const phase = slider("step-phase", "phase", 1, 6, 1, draw);
  const buttons = ["Back", "Next"].map((name, j) => {
    const button = html("button", { type: "button" }, name);
    button.addEventListener("click", () => {
      phase.input.value = Number(phase.input.value) + 2 * j - 1;
      phase.input.dispatchEvent(new Event("input"));
    });
    return button;
  });
  stage.append(html("div", { class: "controls" }, buttons[0], buttons[1], phase.node), readout, picture);

  const { K, r, lr } = data;
  const phases = [
    { own: ["A", "B"], title: "Fixed factors", names: ["A", "B"], shared: [["W", "W"]],
      text: `Every device has the same W. Device i keeps its own slice A_i B_i of it, which never changes.` },
    { own: ["gA", "gB"], title: "Local gradients", names: ["g_A", "g_B"], shared: [["W", "W"]],
      text: "Every device runs its own mini-batch through Y = X W. The backward gives the gradients of its factors." },
    { own: ["dA", "dB"], title: "Increments", names: ["ΔA", "ΔB"], shared: [["W", "W"]],
      text: `The optimizer turns gradients into increments; AdamW's first step is ${lr} or -${lr} nearly everywhere.` },
    { own: ["dU"], title: "Updates", names: ["ΔU"], shared: [["W", "W"]],
      text: `ΔU_i = ΔA_i B_i + A_i ΔB_i + ΔA_i ΔB_i has the shape of W, and rank 2r = ${2 * r}.` },
    { own: ["dU"], title: "Mean", names: ["ΔU"], shared: [["W", "W"], ["dW", "ΔW, the mean of all ΔU_i"]],
      text: `The mean of the ${K} updates has rank 2Kr = ${2 * K * r}: their slices do not overlap.` },
    { own: [], title: "Merge", names: [], shared: [["W", "W"], ["dW", "ΔW"], ["new", "W + ΔW"]],
      text: `W takes the mean, on every device alike; increments go back to zero. ` +
        `Loss ${data.loss[0]} before, ${data.loss[1]} after.` },
  ];

  // One heat map: colour by sign, opacity by size relative to the largest entry.
  function heat(key, label) {
    const { shape: [rows, columns], rank, largest, percent } = data.matrices[key];
    const cell = 5, words = `${label}, ${rows} by ${columns}, rank ${rank}, largest entry ${largest}`;
    const node = svg("svg", { viewBox: `0 0 ${columns * cell} ${rows * cell}`, width: columns * cell,
      height: rows * cell, role: "img", "aria-label": words }, svg("title", {}, words));
    percent.forEach((row, i) => row.forEach((value, j) => {
      if (value) {
        node.append(svg("rect", { class: value > 0 ? "plus" : "minus", x: j * cell, y: i * cell, width: cell,
          height: cell, opacity: Math.abs(value) / 100 }));
      }
    }));
    return html("div", { class: "matrix" }, html("span", { class: "name" }, label), node,
      html("span", { class: "rank" }, `rank ${rank}`, html("br", {}), `max ${short(largest)}`));
  }

  function draw() {
    const now = Number(phase.input.value), { own, names, shared, title, text } = phases[now - 1];
    readout.textContent = `${now} of ${phases.length}. ${title}: ${text}`;
    buttons[0].disabled = now === 1;
    buttons[1].disabled = now === phases.length;
    const cards = own.length ? [...Array(K).keys()].map((i) => html("div", { class: `card device${i}` },
      html("strong", {}, `device ${i}`),
      html("div", { class: "matrices" }, ...own.map((key, j) => heat(`${key}${i}`, `${names[j]}_${i}`))))) : [];
    picture.replaceChildren(html("div", { class: "card shared" }, html("strong", {}, "on every device"),
      html("div", { class: "matrices" }, ...shared.map(([key, label]) => heat(key, label)))), ...cards);
  }

  return draw;
});
