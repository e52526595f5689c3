// VitePress over the whole repository: every Markdown file is a page at its own path, so the links that work in the
// repository work on the site too.

import { cpSync, mkdirSync } from 'node:fs';
import { dirname, join } from 'node:path';

import { defineConfig, type Plugin } from 'vitepress';

import { allPages, copiesOf, excluded, linkInSite, pageOf, root, sidebar } from '../pages.ts';

const readmes = allPages().filter((page) => page.endsWith('README.md'));

/**
 * Pages lie outside this folder, where Vue is installed: resolves it from here. Node loads it by itself on the server.
 */
const vueOfTheSite: Plugin = {
  name: 'vue-of-the-site',
  enforce: 'pre',
  resolveId(id, _importer, { ssr }) {
    if (!/^vue(?:\/|$)/.test(id)) {
      return null;
    }
    return ssr === true ? { id, external: true } : this.resolve(id, import.meta.filename, { skipSelf: true });
  },
};

export default defineConfig({
  title: 'MiMo Cluster',
  description: 'Serve the MiMo-7B reasoning models on Kubernetes, or on a laptop, with the same code.',
  srcDir: root,
  srcExclude: [...excluded],
  rewrites: Object.fromEntries(readmes.map((page) => [page, pageOf(page)])),
  vite: { publicDir: false, plugins: [vueOfTheSite] },
  markdown: {
    config: (markdown) => {
      markdown.core.ruler.push('links', ({ tokens, env }) => {
        const page = (env as { relativePath: string }).relativePath.replace(
          /(^|\/)index\.md$/,
          '$1README.md',
        );
        for (const token of tokens.flatMap(({ children }) => children ?? [])) {
          const [path = '', fragment] = token.attrGet('href')?.split('#') ?? [];
          if (path === '' || /^[a-z]+:/.test(path)) {
            continue;
          }
          const target = linkInSite(page, path);
          token.attrSet('href', fragment === undefined ? target : `${target}#${fragment}`);
          if (!target.endsWith('.md')) {
            // VitePress takes an unknown ending for a page's name, unless the link has a target.
            token.attrSet('target', '_self');
          }
        }
      });
    },
  },
  themeConfig: {
    nav: [{ text: 'Documentation', link: '/docs/' }],
    sidebar: sidebar() as never,
    outline: 'deep',
    search: { provider: 'local' },
  },
  buildEnd: ({ outDir }) => {
    for (const file of copiesOf(allPages())) {
      mkdirSync(join(outDir, dirname(file)), { recursive: true });
      cpSync(join(root, file), join(outDir, file));
    }
  },
});
