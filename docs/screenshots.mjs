// The pictures of the README, from a running `make up`, by a real headless browser.
//
//   npm install playwright-core && node docs/screenshots.mjs OUT_DIR [PREFECT_URL [MLFLOW_URL]]
//
// Fills in the form of `smoke` and submits it, follows the run to its end, trains a deeper model too, compares both in MLflow.
import { chromium } from 'playwright-core';

const [out, prefect = 'http://127.0.0.1:4200', mlflow = 'http://127.0.0.1:5000'] = process.argv.slice(2);
const source = process.env.SOURCE || '';
const STEPS = 120;
const call = async (url, body) => {
  const options = body ? { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) } : {};
  return (await fetch(url, options)).json();
};
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-sync'],
});
const open = async (url, width, height, pause) => {
  const page = await browser.newPage({ viewport: { width, height } });
  await page.goto(url, { waitUntil: 'load' });
  await page.waitForTimeout(pause);
  return page;
};
const keep = async (page, name) => {
  await page.screenshot({ path: `${out}/${name}.png` });
  console.log(name, page.url());
};
const ended = async (deployment) => {
  for (let i = 0; i < 200; i++) {
    const query = { sort: 'EXPECTED_START_TIME_DESC', limit: 1, flow_runs: { deployment_id: { any_: [deployment] } } };
    const [run] = await call(`${prefect}/api/flow_runs/filter`, query);
    if (run && ['COMPLETED', 'FAILED', 'CRASHED', 'CANCELLED'].includes(run.state_type)) {
      console.log(run.name, run.state_type, JSON.stringify(run.parameters));
      if (run.state_type !== 'COMPLETED') throw new Error(run.state.message);
      return run;
    }
    await new Promise((resolve) => setTimeout(resolve, 3000));
  }
  throw new Error('the run did not end within ten minutes');
};

await keep(await open(`${prefect}/deployments?limit=25`, 1440, 1250, 8000), 'prefect-deployments');

const smoke = await call(`${prefect}/api/deployments/name/pipeline/smoke`);
const form = await open(`${prefect}/deployments/deployment/${smoke.id}/run`, 1440, 1500, 8000);
// Prefect's labels are not tied to their inputs: the input is what follows.
const field = (label, tag) => form.locator(`xpath=//label[contains(., "${label}")]/following::${tag}[1]`);
if (source) await field('Source of text', 'textarea').fill(source);
await field('Length (optimizer steps)', 'input').fill(String(STEPS));
await form.waitForTimeout(500);
await keep(form, 'prefect-form');
await form.getByRole('button', { name: /^(Submit|Run)$/ }).first().click();
await form.waitForTimeout(4000);

const run = await ended(smoke.id);
await keep(await open(`${prefect}/runs/flow-run/${run.id}`, 1440, 1000, 8000), 'prefect-flow-run');
const artifacts = await call(`${prefect}/api/artifacts/filter`, { artifacts: { flow_run_id: { any_: [run.id] } } });
const report = artifacts.find((artifact) => artifact.key === 'report');
await keep(await open(`${prefect}/artifacts/artifact/${report.id}`, 1200, 640, 6000), 'prefect-report');

const train = await call(`${prefect}/api/deployments/name/train/train`);
const deeper = { max_steps: STEPS, n_layer: 4, ...(source ? { data_source: source } : {}) };
const parameters = { experiment: 'experiments/smoke.yaml', overrides: deeper };
await call(`${prefect}/api/deployments/${train.id}/create_flow_run`, { parameters, state: { type: 'SCHEDULED' } });
await ended(train.id);

const found = await call(`${mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=smoke`);
const id = found.experiment.experiment_id;
const filter = "tags.`gptloom.step` = 'train' and params.model.family = 'gpt'";
const runs = (await call(`${mlflow}/api/2.0/mlflow/runs/search`, { experiment_ids: [id], filter, max_results: 2 })).runs;
const text = encodeURIComponent;
const look = async (name, path, height, act = async () => {}) => {
  const page = await open(`${mlflow}/#/${path}`, 1500, height, 9000);
  await page.mouse.click(1473, 36); // the assistant's panel, which a fresh browser opens
  await page.waitForTimeout(3000);
  await act(page);
  await keep(page, name);
};
const picked = text(JSON.stringify(runs.map((each) => each.info.run_id)));
await look('mlflow-compare', `compare-runs?runs=${picked}&experiments=${text(JSON.stringify([id]))}`, 1150);
// Sorted by name MLflow lists steps without the runs around them.
const sorted = `orderByKey=${text('tags.`mlflow.runName`')}&orderByAsc=false&searchFilter=${text(filter)}`;
await look('mlflow-charts', `experiments/${id}/runs?${sorted}&compareRunsMode=CHART`, 1000, async (page) => {
  await page.getByPlaceholder('Search metric charts').fill('^(bpb|train/(bpb|loss|lr|grad_norm))$');
  await page.waitForTimeout(6000);
});
await look('mlflow-system', `experiments/${id}/runs/${runs[0].info.run_id}/system-metrics`, 900);
await browser.close();
