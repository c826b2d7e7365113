"use strict";
// Slide K and r: which components of W each device holds, and the singular values of dW of one update.

interactive("devices", (stage, data) => {
  const d = data.S.length;
  const picture = html("div", { class: "picture" });
  const readout = html("p", { class: "readout", "aria-live": "polite" });
  const K = slider("devices-K", "K, devices", 1, 8, 4, draw);
  const r = slider("devices-r", "r, components per device", 1, 8, 2, draw);
  stage.append(html("div", { class: "controls" }, K.node, r.node), readout, picture);

  const methods = [
    { key: "lora", label: "LoRA", edge: "r", spectrum: (k, rank) => data.lora[rank], end: (k, rank) => rank },
    { key: "pissa", label: "PiSSA", edge: "2r", spectrum: (k, rank) => data.pissa[rank], end: (k, rank) => 2 * rank },
    { key: "hd_pissa", label: "HD-PiSSA", edge: "2Kr", spectrum: (k, rank) => data.hd_pissa[`${k},${rank}`],
      end: (k, rank) => 2 * k * rank },
  ];
  const zero = 10 * Math.log10(data.zero);
  const above = (spectrum) => spectrum.filter((v) => v > zero).length;

  function draw() {
    const k = Number(K.input.value), rank = Number(r.input.value);
    const ranks = methods.map((m) => `${m.label} ${above(m.spectrum(k, rank))}`).join(", ");
    readout.textContent = `K = ${k}, r = ${rank}. Rank of ΔW of one update: ${ranks} of ${d}.`;
    const width = Math.max(300, stage.clientWidth), left = 44;
    picture.replaceChildren(holdings(k, rank, width, left), spectra(k, rank, width, left));
  }

  // A row a device, a column a component; the slice that a device holds is filled.
  function holdings(k, rank, width, left) {
    const row = Math.min(22, 88 / k), cell = (width - left - 8) / d, block = 88 + 28;
    const held = (i) => ({ pissa: 0, hd_pissa: i * rank });
    const words = [...Array(k).keys()].map((i) => `device ${i}: ${i * rank} to ${(i + 1) * rank - 1}`);
    const node = svg("svg", { viewBox: `0 0 ${width} ${2 * block + 36}`, role: "img", "aria-label":
      `Components of W that each device holds. HD-PiSSA: ${words.join("; ")}. ` +
      `PiSSA: every device holds 0 to ${rank - 1}. LoRA starts from random factors and holds none.` });
    for (const [at, key, title] of [[0, "pissa", "PiSSA: components by device"],
      [block, "hd_pissa", "HD-PiSSA: components by device"]]) {
      node.append(svg("text", { x: left, y: at + 12 }, title));
      for (let i = 0; i < k; i++) {
        const y = at + 18 + i * row, start = held(i)[key];
        node.append(svg("rect", { class: "empty", x: left, y, width: d * cell, height: row - 2 }),
          svg("rect", { class: `held device${i}`, x: left + start * cell, y, width: rank * cell, height: row - 2 }),
          svg("text", { class: "small", x: left - 6, y: y + row / 2 + 3, "text-anchor": "end" }, String(i)));
      }
    }
    for (let j = 0; j <= d; j += 16) {
      node.append(svg("text", { class: "small", x: left + j * cell, y: 2 * block + 12, "text-anchor": "middle" },
        String(j)));
    }
    node.append(svg("text", { class: "small", x: left + d * cell / 2, y: 2 * block + 27, "text-anchor": "middle" },
      "component of W, largest singular value first"));
    return node;
  }

  // log10 of the singular values of dW over their index, an edge for each method's rank.
  function spectra(k, rank, width, left) {
    const top = 52, height = 190, step = (width - left - 8) / d;
    const x = (count) => left + count * step, y = (tenths) => top + (-tenths / 160) * height;
    const node = svg("svg", { viewBox: `0 0 ${width} ${top + height + 36}`, role: "img", "aria-label":
      "Singular values of dW of one update, relative to the largest. " + methods.map((m) =>
        `${m.label}: ${above(m.spectrum(k, rank))} above ${data.zero}, edge ${m.edge} = ${m.end(k, rank)}`).join("; ") });
    node.append(svg("text", { x: left, y: 12 }, "Singular values of ΔW of one update"));
    for (const decade of [0, -4, -8, -12, -16]) {
      const label = decade ? `1e${decade}` : "1";
      node.append(svg("line", { class: "grid", x1: left, x2: x(d), y1: y(10 * decade), y2: y(10 * decade) }),
        svg("text", { class: "small", x: left - 6, y: y(10 * decade) + 4, "text-anchor": "end" }, label));
    }
    methods.forEach((m, row) => {
      const end = m.end(k, rank), edge = x(Math.min(end, d)), flip = end > 0.7 * d;
      node.append(svg("line", { class: `edge ${m.key}`, x1: edge, x2: edge, y1: top - 34 + 13 * row, y2: top + height }),
        svg("text", { class: `small label ${m.key}`, x: edge + (flip ? -5 : 5), y: top - 26 + 13 * row,
          "text-anchor": flip ? "end" : "start" }, `${m.label}: ${m.edge} = ${end}${end > d ? `, over ${d}` : ""}`));
    });
    for (const m of methods) {
      const points = m.spectrum(k, rank).map((v, j) => [x(j + 0.5), y(v)]);
      node.append(svg("polyline", { class: `line ${m.key}`, points: points.map((p) => p.join()).join(" ") }));
      if (m.key === "hd_pissa") {
        for (const [cx, cy] of points) node.append(svg("circle", { class: m.key, cx, cy, r: 2 }));
      }
    }
    for (let j = 0; j <= d; j += 16) {
      node.append(svg("text", { class: "small", x: x(j), y: top + height + 15, "text-anchor": "middle" }, String(j)));
    }
    node.append(svg("text", { class: "small", x: x(d / 2), y: top + height + 31, "text-anchor": "middle" },
      "number of singular values, relative to the largest"));
    return node;
  }

  return draw;
});
